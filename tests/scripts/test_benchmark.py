import json

from scripts import benchmark


def test_it_measures_every_way_beside_the_first(tiny_llm, tmp_path, capsys):
    figures_file = tmp_path / "figures.json"
    small = ["--seq_len", "64", "--pred_len", "8", "--batch_size", "3", "--d_ff", "8", "--rounds", "2"]
    assert benchmark.main(["--llm_model_path", tiny_llm("qwen2"), *small, "--json", str(figures_file)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(figures_file.read_text(encoding="utf-8"))
    ways = {way["way"]: way for way in figures["ways"]}
    assert list(ways) == [way.name for way in benchmark.WAYS]
    assert all(f"| {name} |" in printed for name in ways)
    for way in ways.values():
        assert way["forecast_difference"] < 1e-5, way["way"]
        assert way["gradient_difference"] < 1e-4, way["way"]
        assert len(way["steps"]) == len(way["evaluations"]) == 2
        assert way["peak_bytes"] > 0
    reference, ours = ways["Time-LLM's way"], ways["compact map"]
    assert reference["step_ratio"] == reference["evaluation_ratio"] == reference["peak_share"] == 1
    assert reference["tokens_without_gradient"] == 0
    assert ours["tokens_with_gradient"] == 3 * 8  # eight patches a window
    assert ours["tokens_with_gradient"] + ours["tokens_without_gradient"] < reference["tokens_with_gradient"]
    assert figures["floor"]["operations"] > 0


def test_a_wrong_flag_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["--llm_model_path", "./gone"]) == 2
    problem = capsys.readouterr().err
    assert problem.startswith("error: ")
    assert problem.count("\n") == 1
