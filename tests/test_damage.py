"""What a run reads back may be damaged or a stranger's: it is refused in a line, or changes nothing."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import run_main
from scripts import compare, prototypes
from utils.errors import UserError
from utils.runs import load_run

DLINEAR = ["--model", "DLinear", "--pred_len", "4"]


@pytest.fixture
def frame(csv_folder):
    return pd.read_csv(csv_folder / "small.csv")


def flip(path, place):
    """Turn one bit of a file around."""
    contents = bytearray(path.read_bytes())
    contents[place // 8] ^= 1 << place % 8
    path.write_bytes(contents)


def edit(path, change):
    """Change what a file that torch has saved holds."""
    contents = torch.load(path, weights_only=True)
    change(contents)
    torch.save(contents, path)


def assert_one_line(finished, *words):
    assert finished.code == 2, finished.out
    assert finished.err.startswith("error: ") and finished.err.count("\n") == 1, finished.err
    for word in words:
        assert word in finished.err


def test_a_flipped_bit_of_a_checkpoint_is_refused_or_harmless(run, flags, frame, request):
    folder = run(*flags, *DLINEAR, "--level", "50").folder
    path, forecast = folder / "checkpoint", load_run(folder).predict(frame)
    whole, generator, refused = path.read_bytes(), random.Random(4), 0
    flips = max(request.config.getoption("--fuzz"), 40)
    for _ in range(flips):
        flip(path, generator.randrange(8 * len(whole)))
        try:
            pd.testing.assert_frame_equal(load_run(folder).predict(frame), forecast, check_exact=True)
        except UserError as problem:
            refused += 1
            assert "checkpoint is damaged" in str(problem)
        path.write_bytes(whole)
    assert refused > 0.8 * flips, "most of a checkpoint is weights"


def test_damage_is_named_before_what_it_breaks(run, flags):
    folder = run(*flags, *DLINEAR, "--level", "50").folder
    flip(folder / "checkpoint", 4 * (folder / "checkpoint").stat().st_size)
    for more in ([], ["--predict", "--level", "50"]):
        assert_one_line(run(*flags, *DLINEAR, "--is_training", "0", *more), "checkpoint is damaged", "sum of its part")


def test_a_flipped_bit_of_a_state_is_refused_or_harmless(run, flags, request):
    longer = [*flags, *DLINEAR, "--max_steps", "6", "--eval_steps", "3", "--lradj", "constant"]
    folder = run(*longer).folder
    shutil.copytree(folder, "kept")
    expected = torch.load(run(*longer, "--max_steps", "8", "--resume").folder / "last", weights_only=True)["weights"]
    generator, flips, refused = random.Random(4), max(request.config.getoption("--fuzz") // 4, 10), 0
    for _ in range(flips):
        shutil.rmtree(folder)
        shutil.copytree("kept", folder)
        flip(folder / "last", generator.randrange(8 * (folder / "last").stat().st_size))
        done = run(*longer, "--max_steps", "8", "--resume")
        if done.code:
            refused += 1
            assert_one_line(done, "last is damaged")
            continue
        weights = torch.load(folder / "last", weights_only=True)["weights"]
        assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())
    assert refused > flips / 2


WEIGHT = "trend.weight"


def set_in(name, value):
    return lambda contents: contents.update({name: value})


def of_weights(change):
    return lambda contents: change(contents["weights"])


MALFORMED = {
    "NaN weights": of_weights(lambda weights: weights[WEIGHT].fill_(float("nan"))),
    "an infinite weight": of_weights(lambda weights: weights[WEIGHT][0].fill_(float("inf"))),
    "weights of another shape": of_weights(lambda weights: weights.update({WEIGHT: torch.zeros(3)})),
    "a weight too many": of_weights(lambda weights: weights.update({"more": torch.zeros(3)})),
    "a weight too few": of_weights(lambda weights: weights.pop(WEIGHT)),
    "a weight that is a list": of_weights(lambda weights: weights.update({WEIGHT: [1.0]})),
    "a weight that is sparse": of_weights(lambda weights: weights.update({WEIGHT: torch.zeros(4, 48).to_sparse()})),
    "a weight that is complex": of_weights(lambda weights: weights.update({WEIGHT: torch.zeros(4, 48) * 1j})),
    "a weight of one number": of_weights(lambda weights: weights.update({WEIGHT: torch.zeros(1).expand(4, 48)})),
    "no weights": lambda contents: contents.pop("weights"),
    "weights that are a list": set_in("weights", [torch.zeros(3)]),
    "another format": set_in("format", 99),
    "no flags": lambda contents: contents.pop("flags"),
    "flags that are a list": set_in("flags", ["seq_len"]),
    "no data": lambda contents: contents["flags"].pop("data"),
    "a flag of another type": lambda contents: contents["flags"].update(seq_len="many"),
    "a flag that is none of its choices": lambda contents: contents["flags"].update(model="Prophet"),
    "a flag out of range": lambda contents: contents["flags"].update(seq_len=-1),
    "channels that are numbers": set_in("channels", [1, 2, 3, 4, 5, 6, 7]),
    "a channel twice": lambda contents: contents["channels"].__setitem__(0, "OT"),
    "no channels": lambda contents: contents.update(channels=[], mean=[], deviation=[]),
    "means too few": lambda contents: contents["mean"].pop(),
    "a mean that is NaN": lambda contents: contents["mean"].__setitem__(0, float("nan")),
    "an infinite deviation": lambda contents: contents["deviation"].__setitem__(0, float("inf")),
    "a deviation of 0": lambda contents: contents["deviation"].__setitem__(0, 0.0),
    "a negative deviation": lambda contents: contents["deviation"].__setitem__(0, -1.0),
    "deviations that are texts": set_in("deviation", ["1"] * 7),
    "an explainer that is a text": set_in("explainer", "temperature"),
    "an explainer of nothing": set_in("explainer", {"columns": []}),
    "is_long that is a text": set_in("is_long", "no"),
    "no progress": lambda contents: contents.pop("progress"),
    "progress that is a number": set_in("progress", 3),
    "rows beyond 64 bits": set_in("trained_rows", [2**70]),
    "weights of whole numbers": of_weights(lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(torch.int8)})),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_checkpoint_is_one_line(run, flags, what):
    folder = run(*flags, *DLINEAR).folder
    edit(folder / "checkpoint", MALFORMED[what])
    assert_one_line(run(*flags, *DLINEAR, "--is_training", "0"), "checkpoint")
    assert_one_line(run(*flags, *DLINEAR, "--is_training", "0", "--predict"), "checkpoint")
    with pytest.raises(UserError):
        load_run(folder)


MALFORMED_STATES = {
    "no training": lambda contents: contents.pop("training"),
    "steps that are a text": lambda contents: contents["training"].update(steps="3"),
    "no random states": lambda contents: contents["training"].update(random=[]),
    "a random state of another kind": lambda contents: contents["training"].update(random=[{"cpu": torch.zeros(3)}]),
    "a history of numbers": lambda contents: contents["training"].update(history=[1, 2]),
    "no optimizer": lambda contents: contents["training"].update(optimizer={}),
    "moments of another shape": lambda contents: contents["training"]["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(3)
    ),
    "moments that are NaN": lambda contents: contents["training"]["optimizer"]["state"][0]["exp_avg"].fill_(
        float("nan")
    ),
    "a schedule of another kind": lambda contents: contents["training"].update(schedule={"step": 3}),
    "a history without numbers": lambda contents: contents["training"].update(history=[["a", "b"]]),
    "an empty row of the history": lambda contents: contents["training"].update(history=[[]]),
    "a rate that is a text": lambda contents: contents["training"]["optimizer"]["param_groups"][0].update(lr="x"),
    "rates that are texts": lambda contents: contents["training"]["schedule"].update(_last_lr=["x"]),
    "first rates that are texts": lambda contents: contents["training"]["schedule"].update(base_lrs="x"),
    "a schedule without a place": lambda contents: contents["training"]["schedule"].update(last_epoch="x"),
    "no moments": lambda contents: contents["training"]["optimizer"].update(state={}),
    "moments without a mean": lambda contents: contents["training"]["optimizer"]["state"][0].pop("exp_avg"),
    "a batch beyond the epoch": lambda contents: contents["training"].update(batch=10**6),
    "a loss that is a truth": lambda contents: contents["training"].update(loss_sum=torch.tensor(True)),
    "steps beyond all": lambda contents: contents["training"].update(steps=10**18),
    "weights of whole numbers": of_weights(lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(torch.int8)})),
}


@pytest.mark.parametrize("what", MALFORMED_STATES)
def test_a_malformed_state_is_one_line(run, flags, what):
    folder = run(*flags, *DLINEAR).folder
    edit(folder / "last", MALFORMED_STATES[what])
    assert_one_line(run(*flags, *DLINEAR, "--resume", "--max_steps", "6"), "last")


def edit_calibration(path, **changes):
    with np.load(path) as file:
        contents = {name: file[name] for name in file}
    for name, change in changes.items():
        contents[name] = change(contents[name])
    np.savez(path.with_suffix(""), **contents)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantiles": lambda values: np.full_like(values, np.nan)},
        {"quantiles": lambda values: -values},
        {"quantiles": lambda values: values[::-1]},
        {"quantiles": lambda values: values[:50]},
        {"quantiles": lambda values: values[:, :3]},
        {"quantiles": lambda values: values[..., :2]},
        {"quantiles": lambda values: values.astype(str)},
        {"channels": lambda values: values[:2]},
        {"is_pooled": lambda _: np.array([True, False])},
    ],
    ids=["NaN", "negative", "out of order", "levels", "channels", "steps", "texts", "names", "pooled"],
)
def test_a_malformed_calibration_is_one_line(run, flags, changes):
    folder = run(*flags, *DLINEAR, "--level", "50").folder
    edit_calibration(folder / "calibration.npz", **changes)
    forecast = run(*flags, *DLINEAR, "--is_training", "0", "--predict", "--level", "50")
    assert_one_line(forecast, "calibration.npz is damaged")


@pytest.mark.parametrize("contents", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=repr)
def test_a_broken_json_of_a_run_is_one_line(run, flags, contents):
    two = [*flags, *DLINEAR, "--itr", "2", "--resume", "auto"]
    first, _ = run(*two).folders
    for name in ("metrics.json", "args.json"):
        kept = (first / name).read_bytes()
        (first / name).write_bytes(contents)
        finished = run(*two)
        if name == "metrics.json" or finished.code:
            assert_one_line(finished, f"{name} is damaged")
        (first / name).write_bytes(kept)


def test_wrong_changes_of_flags_are_one_line(run, flags):
    folder = run(*flags, *DLINEAR).folder
    for change, words in (
        ({"data": "nope"}, "--data cannot be 'nope'"),
        ({"batch_size": "many"}, "--batch_size"),
        ({"seq_len": None}, "--seq_len"),
        ({"nope": 1}, "no flag nope"),
    ):
        with pytest.raises(UserError, match=words):
            load_run(folder, **change)


def test_a_strangers_flags_take_no_memory(run, flags):
    """25 GB of a layer that the weights do not have."""
    for more, flag in (([], "n_heads"), (["--model", "PatchTST"], "d_ff")):
        folder = run(*flags, *more, "--des", flag).folders[0]
        folder = next(path for path in Path("checkpoints").iterdir() if f"_{flag}_" in path.name)
        edit(folder / "checkpoint", lambda contents, flag=flag: contents["flags"].update({flag: 2_000_000_000}))
        with pytest.raises(UserError, match="does not fit"):
            load_run(folder)


def test_an_absurd_llm_is_refused_at_once(assert_refused, flags, tiny_llm, tmp_path_factory):
    for name, size in (("vocab_size", 10**9), ("hidden_size", 10**12), ("intermediate_size", 10**12)):
        folder = tmp_path_factory.mktemp("absurd") / "llm"
        shutil.copytree(tiny_llm("qwen2"), folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, name: size}), encoding="utf-8")
        assert_refused([*flags, "--llm_model_path", folder], str(folder), name)


LINKED = [
    *("forecast.csv", "metrics.json", "calibration.npz", "pred.npy", "true.npy", "errors.png", "test.png"),
    *("forecast.png", "checkpoint", "last", "history.csv", "args.json"),
]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege under Windows")
def test_no_planted_link_is_written_through(run, flags, tmp_path_factory):
    victim = tmp_path_factory.mktemp("precious") / "file"
    victim.write_text("precious", encoding="utf-8")
    everything = [*flags, *DLINEAR, "--level", "50", "--save_predictions"]
    folder = run(*everything).folder
    for name in LINKED:
        (folder / f"{name}.unfinished").symlink_to(victim)
    (folder / ".owner").symlink_to(victim)
    assert run(*everything, "--is_training", "0").code == 0
    assert run(*everything, "--is_training", "0", "--predict").code == 0
    assert victim.read_text(encoding="utf-8") == "precious"
    assert run(*everything, "--predict").code == 0
    assert victim.read_text(encoding="utf-8") == "precious"
    # Nor is one that has the name of a result.
    for name in LINKED:
        (folder / name).unlink()
        (folder / name).symlink_to(victim)
    assert run(*everything, "--predict").code == 0
    assert victim.read_text(encoding="utf-8") == "precious"


def test_a_strangers_flags_take_no_time(run, flags):
    folder = run(*flags, "--model", "LastValue").folder
    edit(folder / "checkpoint", lambda contents: contents["flags"].update(pred_len=10**9))
    with pytest.raises(UserError, match="--pred_len"):
        load_run(folder)


def test_a_config_that_asks_for_more_than_its_files_hold_is_refused(run, flags, tiny_llm):
    shutil.copytree(tiny_llm("qwen2"), "llm")
    config = Path("llm", "config.json")
    contents = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**contents, "intermediate_size": 9_000_000}), encoding="utf-8")
    assert_one_line(run(*flags, "--llm_model_path", "./llm"), "its config asks for", "billion weights")


def test_a_damaged_table_of_series_is_one_line(run, flags, tmp_path):
    frame = pd.read_csv(Path(flags[flags.index("--root_path") + 1], "small.csv"))
    frame.melt("date", var_name="unique_id", value_name="y").rename(columns={"date": "ds"}).to_csv("l.csv", index=False)
    argv = [*flags, *DLINEAR, "--root_path", ".", "--data_path", "l.csv"]
    folder = run(*argv).folder
    for contents in (b"", b"unique_id,mae\na,1\n", b"\xff\xfe"):
        (folder / "series.csv").write_bytes(contents)
        assert_one_line(run(*argv, "--is_training", "0", "--predict"), "series.csv is damaged")


def test_a_variable_of_matplotlib_is_one_line_in_scripts_too(monkeypatch, capsys):
    monkeypatch.setattr("utils.system.plotting._refusal", "matplotlib refuses MPLBACKEND")
    for script, argv in ((prototypes, ["nowhere"]), (compare, ["--demo"])):
        assert script.main(argv) == 2
        assert capsys.readouterr().err == "error: matplotlib refuses MPLBACKEND\n"


def test_a_comparison_of_damaged_results_is_told(run, flags, capsys, monkeypatch):
    monkeypatch.setattr(compare, "run_child", lambda command: run_main.main(command[2:]))
    argv = [*flags, "--seeds", "1", "--out", "compared", "--way", "DLinear", "--way", "last value"]
    assert compare.main(argv) == 0
    for file in sorted(Path("compared").glob("*DLinear*/metrics.json")):
        contents = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**contents, "cost": []}), encoding="utf-8")
    capsys.readouterr()
    assert compare.main(argv) == 1
    assert "is damaged" in capsys.readouterr().out
