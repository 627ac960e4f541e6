import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli.checks import check_options
from utils.cli.options import get_parser
from utils.cli.places import looks_like_a_path, run_folder

ROOT = Path(__file__).resolve().parents[3]

# Time-LLM's own flags and defaults, from the contract.
TIME_LLM_DEFAULTS = {
    "task_name": "long_term_forecast",
    "is_training": 1,
    "model_comment": "none",
    "model": "TimeLLM",
    "seed": 2021,
    "root_path": "./dataset",
    "features": "M",
    "target": "OT",
    "loader": "modal",
    "freq": "h",
    "checkpoints": "./checkpoints/",
    "seq_len": 96,
    "label_len": 48,
    "pred_len": 96,
    "seasonal_patterns": "Monthly",
    "enc_in": 7,
    "dec_in": 7,
    "c_out": 7,
    "d_model": 16,
    "n_heads": 8,
    "e_layers": 2,
    "d_layers": 1,
    "d_ff": 32,
    "moving_avg": 25,
    "factor": 1,
    "dropout": 0.1,
    "embed": "timeF",
    "activation": "gelu",
    "output_attention": False,
    "patch_len": 16,
    "stride": 8,
    "prompt_domain": 0,
    "llm_model": "LLAMA",
    "llm_dim": 0,
    "num_workers": 0,
    "itr": 1,
    "train_epochs": 10,
    "align_epochs": 10,
    "batch_size": 32,
    "eval_batch_size": 0,
    "patience": 10,
    "learning_rate": 0.0001,
    "des": "test",
    "loss": "MSE",
    "lradj": "type1",
    "pct_start": 0.2,
    "use_amp": False,
    "percent": 100,
}


def test_time_llm_defaults_are_kept():
    args = vars(get_parser().parse_args(["--data", "ETTh1"]))
    assert {name: args[name] for name in TIME_LLM_DEFAULTS} == TIME_LLM_DEFAULTS
    assert args["data_path"] == "ETTh1.csv"
    assert args["model_id"] == "ETTh1_96_96"


def test_the_compact_map_is_the_default():
    assert get_parser().parse_args(["--data", "ETTh1"]).mapping == "compact"


def test_every_flag_has_a_help_text():
    assert all(action.help for action in get_parser()._actions)


def test_run_folder_is_named_as_in_time_llm():
    command = "--data ETTm1 --seq_len 512 --model_id x --model_comment Qwen3B --factor 3 --d_model 32"
    name = run_folder(get_parser().parse_args(command.split()), 2).name
    assert name == (
        "long_term_forecast_x_TimeLLM_ETTm1_ftM_sl512_ll48_pl96_dm32_nh8_el2_dl1_df32_fc3_ebtimeF_test_2-Qwen3B"
    )


def test_demo_presets_give_way_to_flags():
    args = get_parser().parse_args(["--demo", "--batch_size", "5"])
    assert (args.data, args.data_path, args.batch_size, args.pred_len) == ("custom", "demo.csv", 5, 24)


def test_flags_keep_the_order_of_the_table_with_demo():
    """args.json and checkpoints list them in that order, and a resume names the first that differs."""
    demo, plain = (vars(get_parser().parse_args(flags)) for flags in (["--demo"], ["--data", "ETTh1"]))
    assert list(demo) == list(plain)


def test_demo_presets_do_not_contradict_a_flag():
    assert get_parser().parse_args(["--demo", "--prompt_file", "x"]).content == ""
    for name in ("GPT2", "LLAMA"):  # one that is no default, and the default itself
        args = get_parser().parse_args(["--demo", "--llm_model", name])
        assert (args.llm_model, args.llm_model_path) == (name, "")
    assert get_parser().parse_args(["--demo"]).llm_model == get_parser().get_default("llm_model")


@pytest.mark.parametrize("argv", [["--help"], ["--bathc_size", "3"], ["--data", "ETTh1", "--root_path", "nowhere"]])
def test_help_and_typos_answer_without_loading_torch(argv):
    code = "import sys, run_main; code = run_main.main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == ("0 False" if argv == ["--help"] else "2 False")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "ETTh1", "--bathc_size", "3"], ["--bathc_size", "did you mean --batch_size"]),
        (["--data", "ETTh1", "--batch", "3"], ["unrecognized arguments: --batch"]),
        ([], ["--data is required"]),
        (["--data", "ETTh3"], ["--data", "ETTh3", "ETTh1"]),
        (["--data", "ETTh1", "--model", "Autoformer"], ["--model", "Autoformer", "TimeLLM"]),
        (["--data", "ETTh1", "--seq_len", "many"], ["--seq_len", "many"]),
        (["--data", "ETTh1", "--seq_len", "8"], ["--seq_len 8", "--patch_len 16"]),
        (["--data", "ETTh1", "--label_len", "97"], ["--label_len 97", "--seq_len 96"]),
        (["--data", "ETTh1", "--batch_size", "0"], ["--batch_size 0", "at least 1"]),
        (["--data", "ETTh1", "--percent", "101"], ["--percent 101"]),
        (["--data", "ETTh1", "--dropout", "1"], ["--dropout 1"]),
        (["--data", "ETTh1", "--learning_rate", "nan"], ["--learning_rate nan"]),
        (["--data", "ETTh1", "--llm_layers", "0"], ["--llm_layers 0"]),
        (["--data", "ETTh1", "--content", "a", "--prompt_file", "b"], ["--content", "--prompt_file"]),
        (["--data", "ETTh1", "--checkpoint", "x"], ["--checkpoint", "--is_training 0"]),
        (["--data", "ETTh1", "--model_comment", "a/b"], ["--model_comment", "'/'"]),
        (
            ["--data", "ETTh1", "--root_path", "nowhere"],
            ["nowhere", "ETTh1.csv", "--root_path", "python scripts/fetch.py ett"],
        ),
        (["--data", "ETTh1", "--seed", "-1"], ["--seed -1"]),
        (["--data", "ETTh1", "--seed", "4294967295", "--itr", "2"], ["--seed", "--itr 2"]),
        (["--demo", "--checkpoints", __file__], ["is a file", "--checkpoints"]),
        (["--demo", "--des", "x" * 300], ["bytes", "--des"]),
        (["--demo", "--is_training", "0"], ["no checkpoint", "train first"]),
        (["--demo", "--root_path", str(Path(__file__, "nowhere"))], ["cannot write"]),
    ],
)
def test_wrong_flags_get_one_line(assert_refused, argv, words):
    assert_refused(argv, *words)


def test_missing_files_are_named(assert_refused, flags):
    assert_refused([*flags, "--content", "", "--prompt_file", "gone.txt"], "gone.txt", "--prompt_file")
    assert_refused([*flags, "--llm_model_path", "./gone"], "./gone", "--llm_model_path", "scripts/fetch.py smollm2")
    assert_refused([*flags, "--is_training", "0"], "no checkpoint", "train first")
    assert_refused([*flags, "--is_training", "0", "--checkpoint", "gone"], "gone", "--checkpoint")


def test_sound_flags_pass():
    check_options(get_parser().parse_args(["--data", "ETTh1", "--percent", "10", "--llm_layers", "3"]))


def test_folders_are_told_from_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base_models").mkdir()
    for path in ("./x", "/x/y", "a/b/c", "..\\models\\q", "base_models", "base_models/gone"):
        assert looks_like_a_path(path), path
    for hub_id in ("", "gpt2", "Qwen/Qwen2.5-3B"):
        assert not looks_like_a_path(hub_id), hub_id
