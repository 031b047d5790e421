"""Loading a sharded folder takes little more memory than the model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d1lit.models import export_model
from d1lit.models.presets import fresh_network, tiny_config

ROOT = Path(__file__).resolve().parents[1]
LOAD = """
import ctypes, gc, sys, torch
from pathlib import Path
from d1lit.models import load_network
from d1lit.modules.accounting import peak_memory_mb, reset_peak_memory
load_network(sys.argv[1])
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
status = Path("/proc/self/status").read_text()
before = int(status.split("VmRSS:")[1].split()[0]) * 1024
reset_peak_memory()
network = load_network(sys.argv[2])
size = sum(p.numel() * p.element_size() for p in network.parameters())
print(round(peak_memory_mb() * 2**20 - before), size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["d1lit", "official"])
def test_loading_a_sharded_folder_peaks_below_its_size_and_a_third(layout, tmp_path):
    """LLaDA-8B's proportions (its files are a sixth of it each) at a fortieth of the width."""
    small = tiny_config(64, 60, 61, 61, 16, 1, 2, 16, 1e4, 64, init_std=0.1)
    config = tiny_config(8192, 1, 2, 2, 512, 16, 8, 1536, 1e4, 64, init_std=0.1)
    config.family = small.family = "llada"
    export_model(fresh_network(small, 0, torch.float32), tmp_path / "small", layout)
    export_model(fresh_network(config, 0, torch.float32), tmp_path / "large", layout, max_shard_size="40MB")
    files = list((tmp_path / "large").glob("*.safetensors"))
    assert len(files) >= 5
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, size = map(int, done.stdout.split()[-2:])
    print(f"{layout}: {len(files)} files, {size / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB: {peak / size:.2f} times")
    assert 0.9 < peak / size < 1.3
