"""What a checkpoint folder must be to become a version: whole, unambiguous, and what its headers say."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.source import FolderSource
from weightline.chain.read.history import Chain
from weightline.chain.replay.state import read_state
from weightline.chain.write.standalone import commit_folder
from weightline.errors import InputError
from weightline.store.memory import MemoryStore
from weightline.types import TensorSpec

_A, _B = np.arange(6, dtype=np.uint16), np.arange(4, dtype=np.float32)
_MAP = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}


def _save(path: Path, **tensors: Any) -> None:
    save_file(tensors, path)


def _index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    _save(tmp_path / _MAP["a"], a=_A)
    _save(tmp_path / _MAP["b"], b=_B)
    _index(tmp_path, _MAP)
    return tmp_path


def test_an_index_names_the_files(sharded: Path) -> None:
    _save(sharded / "consolidated.safetensors", a=_A, other=_B)
    target = FolderSource(sharded)
    assert set(target.specs) == {"a", "b"}
    assert np.array_equal(target.read(["b"])["b"], _B.view(np.uint32))


def test_a_tensor_is_taken_from_the_file_that_the_index_names(sharded: Path) -> None:
    _save(sharded / _MAP["b"], a=_A + 1, b=_B)
    assert np.array_equal(FolderSource(sharded).read(["a"])["a"], _A)


def test_a_torn_checkpoint_is_not_committed(sharded: Path) -> None:
    (sharded / _MAP["b"]).unlink()
    chain = Chain(MemoryStore())
    with pytest.raises(InputError, match=r"names 'model-2-of-2\.safetensors', which .* does not hold"):
        commit_folder(chain, sharded)
    assert chain.tip_version() is None


@pytest.mark.parametrize(
    ("held", "told"),
    [({"c": _B}, "lacks tensor b"), ({"b": _B, "c": _B}, "holds tensor c, which the index does not name")],
)
def test_an_index_and_its_files_name_the_same_tensors(sharded: Path, held: dict[str, Any], told: str) -> None:
    _save(sharded / _MAP["b"], **held)
    with pytest.raises(InputError, match=told):
        FolderSource(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../a.safetensors"}, {"a": "/a"}, {"a": ""}])
def test_an_index_that_is_none_is_refused(sharded: Path, weight_map: object) -> None:
    _index(sharded, weight_map)
    with pytest.raises(InputError, match=r"index\.json (is not an index|names)"):
        FolderSource(sharded)


def test_model_safetensors_is_the_model_whatever_lies_beside_it(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", a=_A)
    _save(tmp_path / "consolidated.safetensors", b=_B)
    assert set(FolderSource(tmp_path).specs) == {"a"}


def test_an_adapter_folder_holds_an_adapter(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", a=_A)
    _save(tmp_path / "adapter_model.safetensors", b=_B)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert set(FolderSource(tmp_path).specs) == {"b"}


def test_one_file_of_another_name_will_do(tmp_path: Path) -> None:
    _save(tmp_path / "weights.safetensors", a=_A)
    assert set(FolderSource(tmp_path).specs) == {"a"}


def _two_files(folder: Path) -> None:
    _save(folder / "one.safetensors", a=_A)
    _save(folder / "two.safetensors", b=_B)


def _whole_and_index(folder: Path) -> None:
    _save(folder / "model.safetensors", a=_A)
    _save(folder / "part.safetensors", a=_A)
    _index(folder, {"a": "part.safetensors"})


def _two_indices(folder: Path) -> None:
    _save(folder / "part.safetensors", a=_A)
    for kind in ("fp16", "fp32"):
        _index(folder, {"a": "part.safetensors"}, f"model.{kind}.safetensors.index.json")


@pytest.mark.parametrize("make", [_two_files, _whole_and_index, _two_indices, lambda folder: None])
def test_a_folder_that_loaders_would_read_in_two_ways_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path)
    with pytest.raises(InputError, match=r"leave only|outdated|checkpoint folder"):
        FolderSource(tmp_path)


def _file(folder: Path, header: object, data: bytes = b"abcdefgh", name: str = "model.safetensors") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / name
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def _tensor(shape: object, offsets: object, dtype: object = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, object] = {
    "a list": [1, 2],
    "nothing": {},
    "an entry that is no object": {"a": 5},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 2]}},
    "a dtype that is no text": {"a": _tensor([1], [0, 2], dtype=["F16"])},
    "an unknown dtype": {"a": _tensor([1], [0, 2], dtype="F4")},
    "a size that is no number": {"a": _tensor(["1"], [0, 2])},
    "sizes below zero": {"a": _tensor([-2, -2], [0, 8])},
    "offsets below zero": {"a": _tensor([2], [-4, 0])},
    "offsets in the wrong order": {"a": _tensor([0], [2, 0])},
    "three offsets": {"a": _tensor([1], [0, 2, 4])},
    "a size beyond every file": {"a": _tensor([1 << 60], [0, 1 << 61])},
    "offsets of another size": {"a": _tensor([2], [0, 2])},
    "offsets beyond the file": {"a": _tensor([2], [6, 10])},
    "overlapping tensors": {"a": _tensor([2], [0, 4]), "b": _tensor([2], [2, 6])},
    "one tensor inside another": {"a": _tensor([4], [0, 8]), "b": _tensor([1], [2, 4]), "c": _tensor([1], [6, 8])},
    "a name twice": b'{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"F16","shape":[1],'
    b'"data_offsets":[2,4]}}',
    "a name that is no text": b'{"\\ud800":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}',
    "no json": b"{",
    "no utf-8": b'{"\xff": 1}',
    "a deep nest": b"[" * 100_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    path = _file(tmp_path, HOSTILE[name])
    with pytest.raises(InputError) as caught:
        FolderSource(path)
    assert str(path) in str(caught.value)


def test_what_the_format_allows_is_taken(tmp_path: Path) -> None:
    """Scalars, empty tensors, any order, any place in the file."""
    header = {
        "__metadata__": {"format": "pt"},
        "late": _tensor([], [6, 8]),
        "empty": _tensor([0, 3], [2, 2]),
        "early": _tensor([1], [0, 2], dtype="BF16"),
    }
    target = FolderSource(_file(tmp_path, header))
    assert target.read(["late"])["late"].tobytes() == b"gh"
    assert target.read(["empty"])["empty"].size == 0
    chain = Chain(MemoryStore())
    commit_folder(chain, tmp_path)
    assert read_state(chain, 0).bits["early"].tobytes() == b"ab"


def _written(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], padding: int = 0) -> Path:
    """A safetensors file of any layout: its header ends `padding` bytes past a multiple of eight."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    return _file(path.parent, text, data, path.name)


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_tensors_that_lie_at_no_multiple_of_their_width_are_read(tmp_path: Path, padding: int) -> None:
    raw = bytes(range(48))
    file = _written(
        tmp_path / "model.safetensors",
        {
            "flag": ("BOOL", [3], raw[:3]), "packed": ("U32", [4], raw[3:19]), "ids": ("I64", [2], raw[19:35]),
            "half": ("BF16", [2, 1], raw[35:39]), "one": ("U8", [], raw[39:40]), "wide": ("F64", [1], raw[40:]),
        },
        padding,
    )  # fmt: skip
    chain = Chain(MemoryStore())
    commit_folder(chain, tmp_path)
    _written(file, {"flag": ("BOOL", [3], raw[:3]), "packed": ("U32", [4], raw[7:23]), "ids": ("I64", [2], raw[19:35]),
                    "half": ("BF16", [2, 1], raw[1:5]), "one": ("U8", [], raw[:1]), "wide": ("F64", [1], raw[40:])},
             padding)  # fmt: skip
    commit_folder(chain, tmp_path)
    names = ("flag", "packed", "ids", "half", "one", "wide")
    states = [read_state(chain, version).bits for version in (0, 1)]
    first, second = (b"".join(bits[name].tobytes() for name in names) for bits in states)
    assert first == raw
    assert second == raw[:3] + raw[7:23] + raw[19:35] + raw[1:5] + raw[:1] + raw[40:]
    for bits_N in FolderSource(tmp_path).read(["flag", "packed", "ids", "half", "one", "wide"]).values():
        assert bits_N.flags.aligned


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """At most 128 more open files than now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = sum(1 for _ in Path("/proc/self/fd").iterdir()) + 128
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_number_of_tensors_takes_no_descriptors(tmp_path: Path, few_descriptors: int) -> None:
    names = [f"layers.{n // 256}.experts.{n % 256}.lora" for n in range(4 * few_descriptors)]
    raw = np.random.default_rng(0).bytes(32)
    _written(tmp_path / "model.safetensors", {name: ("BF16", [2, 8], raw) for name in names})
    chain = Chain(MemoryStore())
    commit_folder(chain, tmp_path)
    write_checkpoint(chain, 0, tmp_path / "pulled")
    held = FolderSource(tmp_path / "pulled").read(names)
    assert {bits_N.tobytes() for bits_N in held.values()} == {raw}
    commit_folder(chain, tmp_path / "pulled")
    assert chain.manifest(1).num_changed == 0


def test_the_number_of_files_takes_no_descriptors(tmp_path: Path, few_descriptors: int) -> None:
    weight_map = {f"t{n}": f"model-{n}.safetensors" for n in range(2 * few_descriptors)}
    for name, file in weight_map.items():
        _written(tmp_path / file, {name: ("U8", [4], name.ljust(4).encode())}, padding=1)
    _index(tmp_path, weight_map)
    source = FolderSource(tmp_path)
    assert all(bits.tobytes() == name.ljust(4).encode() for name, bits in source.read(weight_map).items())
    commit_folder(Chain(MemoryStore()), tmp_path)


@pytest.mark.parametrize("broken", ["model.safetensors.index.json", _MAP["a"], "config.json", "extra/vocab.bpe"])
def test_a_link_without_a_target_is_a_checkpoint_that_is_not_whole(sharded: Path, broken: str) -> None:
    path = sharded / broken
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/0123")
    chain = Chain(MemoryStore())
    with pytest.raises(InputError, match=rf"{broken} is a link to \.\./\.\./blobs/0123, which does not exist"):
        commit_folder(chain, sharded)
    assert chain.tip_version() is None


@pytest.mark.parametrize("missing", ["model.safetensors.index.json", _MAP["a"], "config.json", "extra/vocab.bpe"])
def test_a_pointer_of_git_lfs_is_a_checkpoint_that_is_not_whole(sharded: Path, missing: str) -> None:
    path = sharded / missing
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234567\n")
    chain = Chain(MemoryStore())
    with pytest.raises(InputError, match=rf"{missing} is a pointer of Git LFS.*git lfs pull"):
        commit_folder(chain, sharded)
    assert chain.tip_version() is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pytorch_model.bin", r"pytorch_model\.bin is weights in another format.*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "dtype='auto'"),
        ("consolidated.00.pth", "save_pretrained"),
        ("adapter_model.bin", r"safetensors\.torch\.save_file"),
        ("model.Q4_K_M.gguf", "made from a checkpoint in safetensors"),
        ("zero_to_fp32.py", "--safe_serialization"),
        ("pytorch_model_fsdp_0", "accelerate merge-weights"),
        ("checkpoint-500", r"such as .*/checkpoint-500"),
        ("training_args.bin", "name a checkpoint folder"),
    ],
)
def test_a_folder_of_another_format_gets_the_way_to_convert_it(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"holds no \*\.safetensors: .*{remedy}") as caught:
        FolderSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_tensors_of_four_bits_count_bytes(tmp_path: Path) -> None:
    """A header counts the values of F4, torch and the chain the bytes that hold two of them."""
    held = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    tensors = {"blocks": held.view(torch.float4_e2m1fn_x2), "scales": held[:, :1].clone().view(torch.float8_e8m0fnu)}
    save_torch_file(tensors, tmp_path / "model.safetensors")
    chain = Chain(MemoryStore())
    commit_folder(chain, tmp_path)
    assert chain.tip().specs == {
        "blocks": TensorSpec("blocks", "F4", (2, 8)), "scales": TensorSpec("scales", "F8_E8M0", (2, 1)),
    }  # fmt: skip
    write_checkpoint(chain, 0, tmp_path / "pulled")
    assert FolderSource(tmp_path / "pulled").specs == chain.tip().specs
    with safe_open(tmp_path / "pulled" / "model.safetensors", "pt") as file:
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("shape", [[], [3], [4, 1]])
def test_half_a_byte_is_refused(tmp_path: Path, shape: list[int]) -> None:
    path = _written(tmp_path / "model.safetensors", {"w": ("F4", shape, b"xx")})
    with pytest.raises(InputError, match="a multiple of 2"):
        FolderSource(path)
