"""RUNTIME: files are whole or absent, random streams are independent, the log is what it says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from train_gpt import Log, World, git_commit, make_world, share_threads, stream_seed, user_line, write_atomic


def test_write_atomic_replaces_or_keeps(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_atomic(path, b"never")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_streams_depend_on_seed_purpose_and_index_only():
    assert stream_seed(1, "a") == stream_seed(1, "a")
    assert len({stream_seed(seed, purpose, index) for seed in (1, 2) for purpose in "ab" for index in (0, 1)}) == 8


def test_log_writes_both_files_only_where_it_has_a_folder(tmp_path, capsys):
    ticks = iter(range(100))
    log = Log(tmp_path, lambda: float(next(ticks)))
    log.line("hello")
    log.event("step", step=3, name="x")
    log.close()
    assert (tmp_path / "train.log").read_text() == "hello\n" == capsys.readouterr().out
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert len(event.pop("chain")) == 64 and event == {"event": "step", "t": 1.0, "step": 3, "name": "x"}
    Log(None, lambda: 0.0).line("silent")
    assert capsys.readouterr().out == ""


def test_one_rank_world_is_the_identity():
    world = make_world({})
    assert (world.rank, world.size, world.first) == (0, 1, True)
    tensor = torch.ones(3)
    assert world.add_(tensor) is tensor and world.same(5) == 5 and world.gather(7) == [7]
    assert World(rank=1, size=2).first is False


def test_each_keeps_the_order_and_raises_what_a_lane_raised():
    world = World(lanes=3)
    assert world.each(lambda n: n * n, list(range(20))) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        world.each(lambda n: 1 // n, [1, 0, 2])


def test_lanes_share_the_threads_of_a_cpu():
    before = torch.get_num_threads()
    for threads, jobs, lanes, each in ((4, 2, 2, 2), (4, 9, 4, 1), (3, 1, 1, 3), (1, 8, 1, 1)):
        world, count = share_threads(World(), threads, 1, jobs)
        assert (world.lanes, torch.get_num_threads(), count) == (lanes, each, threads)
    torch.set_num_threads(before)


def test_commit_of_no_repository_is_unknown(tmp_path):
    assert git_commit(tmp_path) == "unknown"


def test_user_line_names_the_file():
    assert user_line(OSError(28, "No space left on device", "/x/y"), "/x").startswith("RUNS_PATH: /x/y: No space left")


def test_help_survives_a_closed_pipe():
    done = subprocess.run(f"{sys.executable} train_gpt.py --help | head -1", shell=True, cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
