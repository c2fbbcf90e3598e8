"""The leaderboard: what it reads of runs and records, how it ranks them, and that the page needs nothing else."""

import json
import re

import pytest

from records import report
from tools import plot

EVENTS = [{"event": "step", "step": i, "train_loss": 6 - i / 10, "train_seconds": i} for i in range(1, 30)] + [
    {"event": "tensor", "name": "tok_emb", "role": "embedding", "format": "int8", "codec": "zstd", "weights": 10,
     "bytes": 600_000}]


def write_run(folder, bpb, evaluator="sliding", **more):
    """A run folder as a finished run leaves it, as far as the page reads it."""
    folder.mkdir(parents=True)
    result = {"preset": "sixteen", "overlay": "tiny", "seed": 3, "scores": {
        evaluator: {"val_bpb": bpb}, "contiguous": {"val_bpb": bpb + 0.1}, "float": {"val_bpb": bpb - 0.5}},
        "artifact": {"model_bytes": 900_000, "code_bytes": 60_000, "total_bytes": 960_000},
        "budget": {"train_seconds": 170.5, "ok": True}, "eval_seconds": 90.0, "train": {"steps": 500},
        "data": {"val_bytes": 2_000, "val_tokens": 1_000}, **more}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    return folder


def test_a_run_counts_with_its_best_evaluator_of_the_artifact(tmp_path):
    """Never with the float weights'; what it has not is empty."""
    write_run(tmp_path / "runs" / "a", 1.8)
    entry, = report.collect([tmp_path / "runs"])
    assert (entry.bpb, entry.evaluator, entry.total_bytes) == (1.8, "sliding", 960_000)
    assert entry.curve.y[0] == pytest.approx(plot.bits_per_byte(5.9 * 1000, 2000)) and entry.kind == "run"
    write_run(tmp_path / "bare", 1.9, artifact=None, budget=None, data=None, train=None)
    entry, = report.collect([tmp_path / "bare"])
    assert entry.total_bytes is None and entry.curve == plot.Curve() and entry.ok is None
    assert " |  |  |  | " in report.markdown([entry])


def test_entries_are_ranked_within_their_validation_split(tmp_path):
    for name, bpb, size in (("worse", 1.9, 2000), ("best", 1.7, 2000), ("elsewhere", 1.0, 500)):
        write_run(tmp_path / name, bpb, data={"val_bytes": size, "val_tokens": 1000})
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "result.json").write_text('{"train": {}}')
    entries = report.collect([tmp_path])
    assert [entry.name for entry in entries] == ["best", "worse", "elsewhere"]
    page = report.page(entries)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["2 of 2,000 validation bytes", "1 of 500 validation bytes"]


def test_a_record_counts_with_its_mean_and_its_dearest_seed(tmp_path):
    folder = tmp_path / "track" / "2026-01-01_x"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({
        "name": "x", "val_bpb": 1.5, "bytes_model": 10, "bytes_code": 5, "metric_label": "ttt",
        "seed_results": {"1": {"train_loop_s": 100.0, "steps": 7}, "2": {"train_loop_s": 120.0, "steps": 6}}}))
    entry, = report.collect([tmp_path])
    assert (entry.kind, entry.bpb, entry.total_bytes, entry.train_seconds, entry.steps, entry.seeds) == (
        "record", 1.5, 15, 120.0, 7, "mean of 2")


def test_the_page_needs_nothing_else_and_takes_names_as_text(tmp_path):
    write_run(tmp_path / "<script>alert(1)", 1.8)
    for number in range(14):
        write_run(tmp_path / f"run{number}", 1.8 + number / 1e4)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_labels_stay_apart():
    """As many names as there are curves fit beside an axis without touching, however close their heights are."""
    figure, axes = report.new_figure(9, 4.6)
    axes.set_ylim(1, 2)
    report.label_right(axes, [(1.5 + number / 1e6, f"{number}", "#000000") for number in range(report.MOST_CURVES)])
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 0.0549


@pytest.mark.parametrize(("content", "said"), [
    ("{", "is not JSON"), ("[1]", "must be a JSON object"), ("[" * 99999, "left out"),
    ('{"scores": {"sliding": {"val_bpb": 1.5}}, "artifact": [], "budget": {"ok": "yes"}, "preset": 3, "data": 1}', "")])
def test_what_cannot_be_read_is_named_and_left_out(tmp_path, capsys, content, said):
    """One bad folder costs its own entry only."""
    write_run(tmp_path / "good", 1.8)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "result.json").write_text(content)
    names = [entry.name for entry in report.collect([tmp_path])]
    assert names == (["good"] if said else ["good", "bad"]) and said in capsys.readouterr().err
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert report.main([str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err


def test_no_link_is_followed_and_strange_events_are_left_out(tmp_path, capsys):
    for name in ("link", "odd", "$a$b"):
        write_run(tmp_path / name, 1.8)
    (tmp_path / "link" / "result.json").unlink()
    (tmp_path / "link" / "result.json").symlink_to("/dev/zero")
    (tmp_path / "odd" / "events.jsonl").write_text('{"event": "step"}\n')
    entries = report.collect([tmp_path])
    assert [entry.name for entry in entries] == ["$a$b"]
    said = capsys.readouterr().err
    assert "is no plain file" in said and "events that no run writes" in said
    assert report.page(entries).count("data:image") == 4


@pytest.mark.parametrize("claim", [{"val_bpb": 1.1, "name": "\ud800"}, {"val_bpb": 1.1, "name": "<img src=x>\n| a"},
                                   {"val_bpb": -5}, {"val_bpb": 1.7e308}, {"val_bpb": 10 ** 400}, {"val_bpb": 0}])
def test_a_strangers_texts_and_numbers_spoil_no_page(tmp_path, capsys, claim):
    """Nor the order: what is no score is no entry."""
    write_run(tmp_path / "good", 1.8)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "submission.json").write_text(json.dumps(claim))
    names = [entry.name for entry in report.collect([tmp_path])]
    assert ("odd" in names) == (claim["val_bpb"] == 1.1) and "good" in names
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert report.main([str(tmp_path), "--markdown"]) == 0
    assert "<img src=x" not in (tmp_path / "page.html").read_text()
    out = capsys.readouterr().out
    assert "<img" not in out and len([line for line in out.splitlines() if line.startswith("| ")]) == 2 + len(names)


def test_the_table_for_a_readme(tmp_path, capsys):
    write_run(tmp_path / "a|b", 1.8)
    assert report.main([str(tmp_path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| what | preset |") and "a\\|b" in lines[2] and "1.8000" in lines[2]
    assert "contiguous 1.9000, float 1.3000" in lines[2] and "960,000" in lines[2]
