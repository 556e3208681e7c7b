"""The chain against a model of it, a list of plain dicts: any order of operations, bits compared after each."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.chain.test_leases import make_lease
from tests.chains import AT_ONCE, commit_state, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.read.leases import write_lease
from weightline.chain.read.refs import current_refs, move_ref, oldest_kept
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import HostState, advance_state, read_state
from weightline.chain.upkeep.compact import AnchorPolicy, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_fork, commit_revert
from weightline.chain.write.version import mark_upgraded
from weightline.errors import UnsupportedFeatureError
from weightline.format import keys
from weightline.format.manifest import FORMAT_1, FORMAT_2, Manifest
from weightline.store.memory import MemoryStore

SHAPES = {"model.embed.weight": (30, 4), "model.norm.weight": (4,), "scale": (), "empty": (0, 4)}
SMALL_GROUP = 100
State = dict[str, np.ndarray]


def same_bits(state: HostState, expected: State) -> bool:
    return all(np.array_equal(state.bits[name], bits.reshape(-1)) for name, bits in expected.items())


class ChainMachine(RuleBasedStateMachine):
    """`states` is what the chain should hold, by version; `kept` the versions that must still be readable."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore()
        self.chain = Chain(self.store)
        self.states: list[State] = [random_state(0, SHAPES)]
        self.named: dict[str, int] = {}
        self.leased: dict[str, set[int]] = {}

    @initialize(written_as=st.sampled_from([FORMAT_1, FORMAT_2]))
    def begin(self, written_as: str) -> None:
        commit_state(self.chain, self.states[0], written_as=written_as)
        self.replica = read_state(self.chain, 0)

    @property
    def tip(self) -> int:
        return len(self.states) - 1

    def kept(self) -> list[int]:
        horizon = oldest_kept(self.chain)
        return sorted({*range(horizon, self.tip + 1), *self.named.values(), *set().union(*self.leased.values())})

    @rule(seed=st.integers(0, 1000), density=st.sampled_from([0.0, 0.02, 0.3, 1.0]), ranks=st.integers(1, 4),
          coding=st.sampled_from(["gap", "gap-by-magnitude"]))  # fmt: skip
    def commit(self, seed: int, density: float, ranks: int, coding: str) -> None:
        new = nudged(self.states[-1], seed, density)
        commit_state(self.chain, new, self.states[-1], world_size=ranks, coding=coding)
        self.states.append(new)

    @rule(seed=st.integers(0, 1000), written_as=st.sampled_from([FORMAT_1, FORMAT_2]))
    def commit_in_a_format(self, seed: int, written_as: str) -> None:
        """Another writer, which does not ask how the chain goes on: readers take any mix."""
        new = nudged(self.states[-1], seed)
        commit_state(Chain(self.store), new, self.states[-1], written_as=written_as)
        self.states.append(new)

    @rule(seed=st.integers(0, 1000))
    def commit_by_an_older_release(self, seed: int) -> None:
        """It reads format 1 alone, and so goes on with the chain or is asked to upgrade."""
        new = nudged(self.states[-1], seed)
        try:
            Manifest.from_bytes(self.store.get(keys.commit(self.tip)))
        except UnsupportedFeatureError:
            assert self.chain.header(self.tip).format == FORMAT_2
            return
        commit_state(Chain(self.store), new, self.states[-1], written_as=FORMAT_1)
        self.states.append(new)

    @rule()
    def upgrade(self) -> None:
        is_old = self.chain.tip_header().format == FORMAT_1
        mark_upgraded(self.chain)
        commit_state(self.chain, self.states[-1], self.states[-1])
        self.states.append(self.states[-1])
        assert self.chain.tip_header().format == FORMAT_2 or not is_old

    @rule(seed=st.integers(0, 1000))
    def commit_any_bits(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        new = {n: rng.integers(0, 1 << 16, b.shape, dtype=np.uint16) for n, b in self.states[-1].items()}
        commit_state(self.chain, new, self.states[-1])
        self.states.append(new)

    @precondition(lambda self: self.tip > 0)
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([v for v in self.kept() if v < self.tip] or [None]))
        if version is not None:
            commit_revert(self.chain, version)
            self.states.append(self.states[version])

    @rule(anchors=st.booleans(), coding=st.sampled_from(["gap", "gap-by-magnitude"]))
    def compact(self, anchors: bool, coding: str) -> None:
        rate = 1e-9 if anchors else 1e9
        policy = AnchorPolicy(delta_elements_per_second=rate)
        plan = plan_compaction(self.chain, coding=coding, policy=policy, group_nbytes=SMALL_GROUP)
        write_compaction(self.chain, plan, coding=coding, group_nbytes=SMALL_GROUP)

    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        expire_before(self.chain, data.draw(st.integers(oldest_kept(self.chain), self.tip)))

    @rule(data=st.data(), name=st.sampled_from(["serving", "best"]))
    def move(self, data: st.DataObject, name: str) -> None:
        version = data.draw(st.sampled_from(self.kept()))
        move_ref(self.chain, name, version)
        self.named[name] = version

    @rule(data=st.data(), name=st.sampled_from(["r-0", "r-1"]), state=st.sampled_from(["serving", "waiting"]))
    def renew_lease(self, data: st.DataObject, name: str, state: str) -> None:
        version, moving_to = (data.draw(st.sampled_from([None, *self.kept()])) for _ in range(2))
        lease = make_lease(name, version, moving_to=moving_to, state=state)
        write_lease(self.chain, lease)
        self.leased[name] = set(lease.versions)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leased)))
        write_lease(self.chain, make_lease(name, 0, state="ended"))
        del self.leased[name]

    @rule()
    def collect_garbage(self) -> None:
        collect(self.chain, plan_gc(view_chain(self.chain), grace=AT_ONCE))
        if self.replica.version not in self.kept():
            self.replica = read_state(self.chain, self.tip)

    @rule()
    def reopen(self) -> None:
        self.chain = Chain(self.store)

    @rule(data=st.data())
    def join_late(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.kept()))
        assert same_bits(read_state(Chain(self.store), version), self.states[version])

    @rule(data=st.data())
    def follow(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.kept()))
        advance_state(self.chain, self.replica, version)
        assert same_bits(self.replica, self.states[version])

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.kept()))
        forked = Chain(MemoryStore("memory://fork"))
        commit_fork(self.chain, version, forked)
        assert same_bits(read_state(forked, 0), self.states[version])

    @invariant()
    def tip_and_refs_stand(self) -> None:
        assert Chain(self.store).tip_version() == self.tip
        assert {name: ref.version for name, ref in current_refs(self.chain).items()} == self.named
        assert plan_between(Chain(self.store), None, self.tip).hops[0].base_version is None

    def teardown(self) -> None:
        report = verify_chain(Chain(self.store), group_nbytes=SMALL_GROUP)
        assert report.holds, report.findings


TestChainMachine = ChainMachine.TestCase
#: A run of the machine costs several times what an example of another test does. The profile decides how deep it goes.
TestChainMachine.settings = settings(max_examples=settings().max_examples // 4)


def test_the_machine_can_read_a_checkpoint_folder(tmp_path: Path) -> None:
    """Not part of the machine, since it writes files: commit of a folder equals commit by ranks."""
    from weightline.chain.files.checkpoint import write_checkpoint
    from weightline.chain.write.standalone import commit_folder

    source, target = Chain(MemoryStore("memory://a")), Chain(MemoryStore("memory://b"))
    states = [random_state(0)]
    commit_state(source, states[0])
    states.append(nudged(states[0], 1))
    commit_state(source, states[1], states[0])
    for version in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(source, version, Path(folder) / "v")
            commit_folder(target, Path(folder) / "v")
    assert [m.digests for m in target.manifests()] == [m.digests for m in source.manifests()]
    assert [m.kind for m in target.manifests()] == ["anchor", "delta"]
    assert same_bits(read_state(target, 1), states[1])
