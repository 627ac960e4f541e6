import types

import pytest
import torch

from scripts.check_6gb import GIB, check, main
from utils.cli.options import get_parser


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_needs_a_gpu(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: there is no CUDA device")


def test_a_case_trains_evaluates_and_reports(flags, monkeypatch):
    card = types.SimpleNamespace(total_memory=8 * GIB)
    limits = []
    stand_ins = {
        **dict.fromkeys(("empty_cache", "reset_peak_memory_stats", "synchronize"), lambda: None),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda: 2 * GIB),
        "get_device_properties": lambda number: card,
        "set_per_process_memory_fraction": limits.append,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr("scripts.check_6gb.STEPS", 6)
    monkeypatch.setattr("scripts.check_6gb.EVALUATED", 2)
    outcome = check("ours", get_parser().parse_args(flags), 5.0)
    assert (limits, outcome["peak"]) == ([5 / 8], 2.0)
    assert all(outcome[name] > 0 for name in ("steps_per_second", "evaluation_windows_per_second", "planned"))
