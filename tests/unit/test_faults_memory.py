"""Files that are small on disk and large in memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from support.run import run_python

from mixprec_build.checkpoint import manifest, opening
from mixprec_build.checkpoint.manifest import ModuleEntry, TensorEntry, dump_manifest


def write_headers(folder: Path, entries: int, files: int = 8) -> None:
    """A checkpoint of files that are nothing but headers, with so many entries in the ``__metadata__`` of each."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    remarks = ",".join(f'"{i:07}":"{i:0170}"' for i in range(entries))
    for k in range(files):
        tensor = f'"t{k}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        header = f'{{"__metadata__":{{"format":"pt",{remarks}}},{tensor}}}'.encode()
        (folder / f"model-{k}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    weight_map = {f"t{k}": f"model-{k}.safetensors" for k in range(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


CODE = """
import sys
from mixprec_build.checkpoint.opening import open_checkpoint
try:
    opened = open_checkpoint(sys.argv[1])
    assert {str(shard.metadata) for shard in opened.shards.values()} == {"{'format': 'pt'}"}
except Exception as error:
    print(error)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_remarks_in_headers_are_not_kept(tmp_path: Path) -> None:
    """Eight headers of 18 MB with 90,000 entries each."""
    write_headers(tmp_path / "h", 90_000)
    ended = run_python("-c", CODE, str(tmp_path / "h"))
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 400_000, f"{ended.stdout} kB"


def test_a_header_of_a_million_remarks_is_refused(tmp_path: Path) -> None:
    write_headers(tmp_path / "h", 150_000, files=2)
    message, peak = run_python("-c", CODE, str(tmp_path / "h")).stdout.splitlines()
    assert message.endswith("`__metadata__` has 150001 entries; at most 100000 are read")
    assert int(peak) < 400_000, f"{peak} kB"


def test_a_manifest_of_as_many_tensors_as_are_read_can_be_read() -> None:
    """Else a build of a large model ends well, and no command or server takes it: Kimi-K3 has 494,000 tensors."""
    expert = "language_model.model.layers.92.block_sparse_moe.experts.895.down_proj"

    def text(count: int) -> bytes:
        leaf = TensorEntry("U8", (7168, 1536), 11_010_048, "model-00299-of-00300.safetensors", "mxfp4", "0" * 32)
        module = ModuleEntry("mxfp4-2", (7168, 3072), {f"{expert}.weight_packed": leaf})
        modules = ((f"{expert}{number:03}", module) for number in range(count))
        return b"".join(dump_manifest({"version": 1, "checksum": "xxh3_128"}, modules))

    few, more = text(10), text(110)
    values = [sum(map(data.count, (b",", b":", b"[", b"{"))) for data in (few, more)]
    assert (len(more) - len(few)) / 100 * opening._MAX_TENSORS < manifest._MAX_BYTES
    assert (values[1] - values[0]) / 100 * opening._MAX_TENSORS < manifest._MAX_VALUES
