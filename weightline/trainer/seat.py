"""Where the callback sits among the callbacks of a trainer, and whether the training that calls it still runs.

transformers calls callbacks in the order of a list, and each of them may change weights or decide to save. So the
callback has its turn after all others at every event, and hears of a finished checkpoint before all others. Neither can
be asked of transformers: the handler that holds the list, and the trainer that holds the model, are found in the frames
of the call to `on_train_begin`.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from weightline.errors import InputError

#: The module of transformers' training loop.
_TRAINER_MODULE = "transformers.trainer"


class CheckpointHerald(TrainerCallback):
    """The first callback of a trainer: it passes `on_save` on before any other callback knows of the checkpoint."""

    def __init__(self, on_save: Callable[..., None]) -> None:
        self._on_save = on_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._on_save(args, state, control, **kwargs)


class Seat:
    """The place of one callback in the list of the handler that calls it. Made in `on_train_begin`.

    A training loop that calls the callback without such a handler decides itself what comes after what.
    """

    def __init__(self, callback: TrainerCallback, kind: type[TrainerCallback], on_save: Callable[..., None]) -> None:
        """Finds the handler. InputError when it calls a second callback of this kind, or this one through another."""
        self._callback = callback
        self._handler = _handler_of(callback)
        self._trainer = _trainer_under_way()
        self._herald = CheckpointHerald(self._announce)
        self._on_save = on_save
        if any(isinstance(other, kind) and other is not callback for other in self._callbacks()):
            raise InputError(
                f"this trainer has two callbacks of the kind {kind.__name__}, and one chain takes one: keep one of "
                "them (trainer.pop_callback takes the other away)",
                field="callbacks",
            )

    def model_watch(self, model: Any) -> Callable[[], Any]:
        """Returns a function that returns the model: `model`, or the one that the trainer holds in its place since.

        A callback may assign another object to `trainer.model`, such as an average of weights. The trainer saves that.
        """
        held = getattr(self._trainer(), "model", None)

        def present() -> Any:
            now = getattr(self._trainer(), "model", held)
            return model if now is held or now is None else now

        return present

    @property
    def has_herald(self) -> bool:
        """Whether the herald hears of checkpoints."""
        return any(callback is self._herald for callback in self._callbacks())

    def take(self) -> None:
        """Puts the herald first and the callback last.

        The list is replaced, not changed: the event that is under way goes on over the old one, and calls each
        callback once.
        """
        if self._handler is not None:
            self._handler.callbacks = [self._herald, *self._without_own(), self._callback]

    def leave(self) -> None:
        """Takes the herald away. The callback stays."""
        if self._handler is not None:
            self._handler.callbacks = [*self._without_own(), self._callback]

    def is_last_turn(self) -> bool:
        """Whether all other callbacks have had their turn at the event under way.

        When not, as after `add_callback` in mid-training, the callback is called once more, after them.
        """
        if self._handler is None:
            return True
        callbacks = self._callbacks()
        if callbacks[-1] is not self._callback:
            callbacks.append(self._callback)  # the loop of the event under way goes over this very list
            return False
        if sum(c is self._callback for c in callbacks) > 1:
            self.take()
        return True

    def _announce(self, *args: Any, **kwargs: Any) -> None:
        """Passes a checkpoint on, unless the callback was removed from the trainer meanwhile."""
        if any(callback is self._callback for callback in self._callbacks()):
            self._on_save(*args, **kwargs)

    def _callbacks(self) -> list[TrainerCallback]:
        found: list[TrainerCallback] = [] if self._handler is None else self._handler.callbacks
        return found

    def _without_own(self) -> list[TrainerCallback]:
        return [c for c in self._callbacks() if c is not self._callback and not isinstance(c, CheckpointHerald)]


def _handler_of(callback: TrainerCallback) -> CallbackHandler | None:
    """The handler that calls this callback. InputError when it calls another callback, and that one calls this one."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            if any(c is callback for c in handler.callbacks):
                return handler
            name = type(callback).__name__
            raise InputError(
                f"{name} is called by another callback, so that it cannot see what the ones after that do to the "
                "weights: add it to the trainer itself (trainer.add_callback)",
                field="callbacks",
            )
        frame = frame.f_back
    return None


def _training_frame() -> FrameType | None:
    """Returns the innermost frame of transformers' training loop; None for other trainers."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != _TRAINER_MODULE:
        frame = frame.f_back
    return frame


def _trainer_under_way() -> Callable[[], Any]:
    """Returns a weak reference to the trainer whose training loop runs; for other trainers it leads to None."""
    frame = _training_frame()
    trainer = None if frame is None else frame.f_locals.get("self")
    return _nothing if trainer is None else weakref.ref(trainer)


class _CallWatch:
    """Detects that a call under way on this thread has ended, with a result or with an error.

    transformers does not notify callbacks of errors. The callback cannot wrap `train`, since it never gets the trainer,
    and a finalizer would run late, since an exception keeps the frames that it passed. So this inspects the stack of
    the training thread.
    """

    def __init__(self, frame: FrameType) -> None:
        self._frame: FrameType | None = frame
        self._thread_id = threading.get_ident()

    def __call__(self) -> bool:
        """Returns whether the call is still under way. May be called from any thread."""
        frame = sys._current_frames().get(self._thread_id)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def _always() -> bool:
    return True


def _nothing() -> None:
    return None


def still_training() -> Callable[[], bool]:
    """Returns a function that says whether the training loop still runs; for other trainers it always returns True."""
    frame = _training_frame()
    return _always if frame is None else _CallWatch(frame)
