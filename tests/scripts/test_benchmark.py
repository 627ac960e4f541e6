import json

from scripts import benchmark


def test_it_measures_every_variant_beside_the_first(tiny_llm, tmp_path, capsys):
    figures_file = tmp_path / "figures.json"
    small = ["--seq_len", "64", "--pred_len", "8", "--batch_size", "3", "--d_ff", "8", "--rounds", "2"]
    assert benchmark.main(["--llm_model_path", tiny_llm("qwen2"), *small, "--json", str(figures_file)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(figures_file.read_text(encoding="utf-8"))
    variants = {found["variant"]: found for found in figures["variants"]}
    assert list(variants) == [variant.name for variant in (*benchmark.VARIANTS, benchmark.IN_BFLOAT16)]
    assert all(f"| {name} |" in printed for name in variants)
    for name, found in variants.items():
        rounding = 1e4 if name == benchmark.IN_BFLOAT16.name else 1
        assert found["forecast_difference"] < 1e-5 * rounding, name
        assert found["gradient_difference"] < 1e-4 * rounding, name
        assert len(found["steps"]) == len(found["evaluations"]) == 2
        assert found["peak_bytes"] > 0
    reference, ours = variants["Time-LLM's way"], variants["compact map"]
    assert reference["step_ratio"] == reference["evaluation_ratio"] == reference["peak_share"] == 1
    assert reference["tokens_without_gradient"] == 0
    assert ours["tokens_with_gradient"] == 3 * 8  # eight patches a window
    assert ours["tokens_with_gradient"] + ours["tokens_without_gradient"] < reference["tokens_with_gradient"]
    assert figures["floor"]["operations"] > 0


def test_embeddings_are_where_the_full_map_reads_them(tiny_llm, monkeypatch):
    """By default, for the compact map, they would be left on the host: the full map on a GPU could not reach them."""
    asked = []

    def load(args):
        asked.append((args.mapping, args.prompt_padding))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "load_llm", load)
    assert benchmark.main(["--llm_model_path", tiny_llm("qwen2")]) == 130
    assert asked == [("full", "right")]


def test_a_wrong_flag_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["--llm_model_path", "./gone"]) == 2
    problem = capsys.readouterr().err
    assert problem.startswith("error: ")
    assert problem.count("\n") == 1
