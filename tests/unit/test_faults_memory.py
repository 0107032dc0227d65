"""Files that are small on disk and large in memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from support.run import run_python


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
