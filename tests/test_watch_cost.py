"""The live view and the cost planner: numbers worked out by hand, logs that grow, are cut short or begin anew, and
mistakes in one line."""

import io
import json
import math
import os
from types import SimpleNamespace

import pytest

import train_gpt as gpt
from tools import cost, watch

SETTINGS = {"PRESET": "sixteen", "OVERLAY": "tiny", "SEED": 7, "ITERATIONS": 100, "MAX_WALLCLOCK_SECONDS": 0,
            "STAGES": ["train", "write", "evaluate"], "EVAL": ["contiguous", "sliding"], "TARGET_BYTES": 1_000_000}


def step(number, loss=None, seconds=None):
    """A step's event: two seconds and 1,000 tokens each."""
    return {"event": "step", "step": number, "train_loss": 5.0 - 0.01 * number if loss is None else loss,
            "lr_factor": 0.5, "train_seconds": 2.0 * number if seconds is None else seconds, "tokens": 1000 * number,
            "grad_norm": 0.25}


def tensor(name, size, weights=800):
    return {"event": "tensor", "name": name, "bytes": size, "weights": weights}


FORECAST = {"event": "eval_forecast", "seconds": {"contiguous": 10.0, "sliding": 60.0}, "warm_up": 1.0}


def score(kind, bpb):
    return {"event": "score", "evaluator": kind, "val_bpb": bpb, "seconds": 12.0}


def lines(events):
    return "".join(json.dumps(event) + "\n" for event in events)


def make_run(folder, events, settings=SETTINGS):
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text(lines(events))
    (folder / "config.json").write_text(json.dumps({"settings": settings}))
    return folder


# ---- watch


def test_training_by_hand(tmp_path):
    events = [{"event": "start"}, *map(step, range(1, 26)), {"event": "val", "step": 20, "val_bpb": 1.75,
                                                             "train_seconds": 40.0}]
    text = watch.frame(make_run(tmp_path / "run", events), events, 0.0)
    assert "sixteen tiny  seed 7\ntraining\n" in text
    assert "step   25 of at most 100  [" + "#" * 10 + "." * 30 + "] 25%" in text
    assert "time   50 s of training, 2:30 left" in text, "75 steps of two seconds"
    # The last twenty: 4.94 down to 4.75.
    assert "loss   4.7500, mean of the last 20: 4.8450 nats   rate x 0.500   gradient 0.250" in text
    assert "speed  500 tokens/s, 2,000.0 ms a step" in text
    assert "BPB    1.7500 of the float weights at step 20" in text and "bytes  not written yet" in text


def test_a_budget_ends_training_before_the_steps_do(tmp_path):
    timed = {**SETTINGS, "MAX_WALLCLOCK_SECONDS": 80}
    assert watch.seconds_left([*map(step, range(1, 26))], timed) == 30
    assert watch.fraction(step(25), timed) == 50 / 80
    assert watch.fraction(step(25), SETTINGS) == 0.25
    assert watch.fraction(step(60), timed) == 1.0
    assert watch.seconds_left([step(1)], timed) is None


def test_what_a_killed_life_did_after_its_checkpoint_never_happened(tmp_path):
    events = [{"event": "start"}, *map(step, range(1, 11)), {"event": "resume", "step": 4, "train_seconds": 20.0},
              step(5, 9.0, 22.0)]
    text = watch.frame(make_run(tmp_path / "run", events), events, 0.0)
    assert "training; resumed 1 time\n" in text and "step   5 of" in text and "loss   9.0000" in text


def test_bytes_and_scores_after_training(tmp_path):
    events = [*map(step, range(1, 4)), tensor("a", 1500.0), tensor("b", 300.0), tensor("b", 500.0), FORECAST,
              score("contiguous", 1.5)]
    text = watch.frame(make_run(tmp_path / "run", events), events, 0.0)
    assert "bytes  2,000 of 2 tensors, 10.00 bits a weight; with the code at most 1,000,000" in text
    assert "BPB    1.5000 contiguous in 12 s" in text and "eval   sliding: forecast 1:00 in all" in text
    assert "evaluating\n" in text and "of training\n" in text and " left" not in text
    events += [score("sliding", 1.25)]
    text = watch.frame(tmp_path / "run", events, 500.0)
    assert "finished\n" in text and "BPB    1.2500 sliding" in text and "eval " not in text and "silent" not in text


def test_what_ends_a_run_depends_on_its_stages():
    assert not watch.is_done([FORECAST, score("contiguous", 1.0)], SETTINGS)
    assert watch.is_done([FORECAST, score("contiguous", 1.0), score("sliding", 1.0)], SETTINGS)
    again = [FORECAST, score("contiguous", 1.0), score("sliding", 1.0), FORECAST]
    assert not watch.is_done(again, SETTINGS), "evaluated anew"
    squeeze = {**SETTINGS, "STAGES": ["calibrate", "write"]}
    assert watch.is_done([tensor("a", 1.0)], squeeze) and not watch.is_done([], squeeze)
    assert not watch.is_done([step(100)], {**SETTINGS, "STAGES": ["train"]})


def test_a_run_that_says_nothing_is_said_to(tmp_path):
    events = [*map(step, range(1, 4))]
    folder = make_run(tmp_path / "run", events)
    assert "training; last event 30 s ago\n" in watch.frame(folder, events, 30.0)
    assert "training; silent for 3:20: busy with something long, or ended\n" in watch.frame(folder, events, 200.0)
    assert "\ntraining\n" in watch.frame(folder, events, 2.0)
    assert "step   none yet" in watch.frame(folder, [], 0.0)
    other = make_run(tmp_path / "other", [], {**SETTINGS, "STAGES": ["evaluate"]})
    assert "step   none: this run does not train" in watch.frame(other, [FORECAST], 0.0)
    assert "sixteen" not in watch.frame(tmp_path, events, 0.0), "a run without config.json has a view"


def test_a_log_that_grows_is_read_from_where_the_last_look_ended(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text(lines([step(1)]) + '{"event": "st')
    tail = watch.Tail(path)
    assert [event["step"] for event in tail.read()] == [1]
    with path.open("a") as file:
        file.write('ep", "step": 2}\nnot JSON\n[1]\n{"event": "cut')
    assert [event["step"] for event in tail.read()] == [1, 2]
    at = tail.at
    assert [event["step"] for event in tail.read()] == [1, 2] and tail.at == at
    path.write_text(lines([step(9)]))
    assert [event["step"] for event in tail.read()] == [9], "begun anew"


def test_the_view_renews_itself_until_the_run_is_done_and_touches_nothing(tmp_path):
    folder = make_run(tmp_path / "run", [step(1), step(2)])
    coming, before = [lines([step(3)]), lines([tensor("a", 8.0), FORECAST, score("contiguous", 1.5)]),
                      lines([score("sliding", 1.25)])], sorted(path.name for path in folder.iterdir())
    out, waited = io.StringIO(), []

    def wait(seconds):
        waited.append(seconds)
        with (folder / "events.jsonl").open("a") as file:
            file.write(coming.pop(0))

    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "events.jsonl"}
    watch.watch(folder, out, True, 0.5, clock=lambda: 0.0, wait=wait)
    views = out.getvalue().split("\x1b[H")[1:]
    assert len(views) == 4 and waited == [0.5] * 3 and not coming
    assert "step   2 of" in views[0] and "step   3 of" in views[1] and "finished" in views[3]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "events.jsonl"}


def test_runs_are_found_by_path_by_name_and_by_time(tmp_path, capsys):
    runs = tmp_path / "runs"
    old, new = make_run(runs / "old", [step(1)]), make_run(runs / "sweeps" / "lr" / "3", [step(2)])
    os.utime(old / "events.jsonl", (1, 1))
    assert watch.find_run("", runs) == new and watch.find_run("old", runs) == old
    assert watch.find_run("3", runs) == new and watch.find_run("lr/3", runs) == new
    assert watch.find_run(str(old), runs) == old
    assert watch.main(["old"], runs) == 0 and "step   1 of" in capsys.readouterr().out
    for argv, said in ((["nosuch"], f"RUN: nosuch: must be a run folder with an events.jsonl, or its name in {runs}"),
                       (["--every", "0"], "--every: 0: must be a number of at least 0.1"),
                       (["old", "--evry"], "unrecognized arguments: --evry")):
        assert watch.main(argv, runs) == 2
        assert capsys.readouterr().err == said + "\n"
    assert watch.main([], tmp_path / "none") == 2 and "holds no run" in capsys.readouterr().err


def test_sparklines():
    assert watch.sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert watch.sparkline([1.0, 3.0, 5.0, 7.0], 2) == "▁█" and watch.sparkline([2.0, 2.0]) == "▁▁"
    assert watch.sparkline([math.nan, 1.0, 2.0]) == "▁█" and watch.sparkline([]) == ""


# ---- plan


SMALL = ["PRESET=baseline", "OVERLAY=", "MODEL_DIM=64", "NUM_HEADS=2", "NUM_KV_HEADS=1", "STACK=A2", "EVAL=contiguous",
         "TRAIN_BATCH_TOKENS=8192", "MICRO_BATCH_TOKENS=1024", "TRAIN_SEQ_LEN=128", "EVAL_SEQ_LEN=128",
         "DATA_PATH=/nowhere", "VOCAB_SIZE=1024"]


def facts(words=SMALL):
    """FLOPs of a micro-batch, and parameters."""
    config = gpt.load_config(words, {}, gpus=8)
    (phase,) = gpt.plan_layers(config.model)
    flops = gpt.forward_flops(config.model, config.data.vocab_size, phase, config.train.train_seq_len)
    return config, 3 * config.train.micro_batch_tokens * flops, sum(
        gpt.count_roles(gpt.make_skeleton(config)).values())


def speed_file(path, gpu="H100", kind="compiled (a GPU)", seconds=0.05, share=1.0, lanes=1):
    """A JSON of bench speed on the settings of SMALL, or on a model with so large a share of its FLOPs."""
    _, flops, parameters = facts()
    row = {"phase": "from 0%", "s round": seconds, "s optimizer": 0.008, "s first": 30.0,
           "TFLOP/step": 8 * share * flops / 1e12, "note": ""}
    title = (f"step, {kind}: PRESET=baseline OVERLAY=, bfloat16, {parameters:,} parameters, 8 micro-batches of "
             f"1,024 tokens, 16 threads in {lanes} lanes, documents of about 1000")
    machine = {"cpu": "a CPU", "cores": 16, **({"gpu": gpu} if gpu else {})}
    failed = {**row, "s round": None, "s optimizer": None, "s first": None, "TFLOP/step": None, "note": "left out"}
    path.write_text(json.dumps({"machine": machine, "tables": [
        {"title": "ceilings: measured here", "rows": []}, {"title": title, "rows": [failed, row]}]}))
    return path


def planned(*argv, **given):
    """The numbers of a plan on SMALL, without the code."""
    options = SimpleNamespace(**{"gpus": 8, "price": None, "seeds": 3, "overhead": 0.0, **given})
    config = gpt.load_config([*SMALL, *argv], {}, gpus=8)
    return cost.make_plan(config, cost.read_speed(given["speed"]), options, 1000)


def test_a_plan_by_hand(tmp_path):
    path = speed_file(tmp_path / "speed.json")
    # Eight micro-batches on two GPUs are four rounds of 50 ms; the optimizer's 8 ms are shared by two: 204 ms.
    numbers, rows = planned("MAX_WALLCLOCK_SECONDS=102.1", gpus=2, speed=path, price=36.0, overhead=67.9)
    assert numbers["step_seconds"] == [pytest.approx(0.204)] and numbers["measured"]
    assert (numbers["steps"], numbers["tokens"]) == (500, 500 * 8192) and numbers["train_seconds"] == 102.1
    # 30 s of compilation, 67.9 of overhead and 102.1 of training at a hundredth a second, and the evaluation.
    evaluation = sum(numbers["eval_seconds"].values())
    assert numbers["price_a_seed"] == pytest.approx(2.0 + evaluation / 100)
    assert numbers["price"] == pytest.approx(3 * numbers["price_a_seed"])
    config, *_ = facts()
    forecast = gpt.forecast_fitted(gpt.make_skeleton(config), config.artifact, 1000)
    assert numbers["total_bytes"] == round(sum(forecast.values())) + 1000
    assert ["step from 0%", "204.0 ms", "measured with these settings, H100 x 2"] in rows


def test_steps_end_training_before_the_budget_does(tmp_path):
    path = speed_file(tmp_path / "speed.json")
    numbers, _ = planned("MAX_WALLCLOCK_SECONDS=102", "ITERATIONS=100", speed=path)
    assert numbers["steps"] == 100 and numbers["train_seconds"] == pytest.approx(100 * (0.05 + 0.001))
    numbers, _ = planned("MAX_WALLCLOCK_SECONDS=0", "ITERATIONS=10", speed=path)
    assert numbers["steps"] == 10


def test_other_settings_take_their_flops_at_the_same_pace(tmp_path):
    path = speed_file(tmp_path / "speed.json", share=0.5)  # twice the FLOPs in a micro-batch as were measured
    numbers, rows = planned(speed=path)
    assert numbers["step_seconds"] == [pytest.approx(2 * 0.05 + 0.001)] and not numbers["measured"]
    assert any("from PRESET=baseline OVERLAY= by FLOPs" in row[2] for row in rows)


def test_lanes_are_one_machine(tmp_path):
    path = speed_file(tmp_path / "speed.json", gpu="", kind="eager", lanes=4)  # a round is four micro-batches
    numbers, rows = planned(gpus=None, speed=path)
    assert numbers["step_seconds"] == [pytest.approx(2 * 0.05 + 0.008)]
    assert "16 cores of a CPU" in rows[1][2]


def test_evaluation_takes_its_positions_over_all_gpus(tmp_path):
    path = speed_file(tmp_path / "speed.json")
    one, eight = (planned(gpus=count, speed=path)[0]["eval_seconds"]["contiguous"] for count in (1, 8))
    # The forward of a micro-batch is a third of 50 ms; the documents are as long as the challenge's.
    tokens, times, where = cost.sample_tokens(facts()[0])
    assert one == pytest.approx(times * len(tokens) / 1024 * 0.05 / 3, rel=0.01)
    assert where == "/nowhere is not here: 50,000 documents as long as the challenge's"
    assert eight == pytest.approx(one / 8, rel=0.05)
    sliding = planned("EVAL=sliding", "EVAL_STRIDE=64", gpus=1, speed=path)[0]["eval_seconds"]["sliding"]
    assert sliding == pytest.approx(2 * one, rel=0.01), "two windows of 128 for as many targets"
    assert planned("STAGES=train", speed=path)[0]["eval_seconds"] == {}


def test_the_dataset_is_used_where_it_is(mini, tmp_path):
    config, *_ = facts([*SMALL[:-2], f"DATA_PATH={mini}", "VOCAB_SIZE=384"])
    tokens, times, where = cost.sample_tokens(config)
    assert len(tokens) == json.loads((mini / "manifest.json").read_text())["val"]["tokens"] and times == 1
    assert where == f"validation split of {mini}"


def test_the_calibration_is_kept_from_the_budget(tmp_path):
    path = speed_file(tmp_path / "speed.json")
    numbers, _ = planned("SOLVER=gptq", "GPTQ_CALIBRATION_BATCHES=16", "MAX_WALLCLOCK_SECONDS=100", speed=path)
    assert numbers["reserve_seconds"] == pytest.approx(gpt.RESERVE_MARGIN * cost.CALIBRATION * 2 * 0.05)
    assert numbers["steps"] == int((100 - numbers["reserve_seconds"]) / 0.051)
    set_, _ = planned("SOLVER=gptq", "RESERVE_SECONDS=7", "MAX_WALLCLOCK_SECONDS=100", speed=path)
    assert set_["reserve_seconds"] == 7 and set_["train_seconds"] == 93


def test_training_is_planned_part_by_part(tmp_path):
    path = speed_file(tmp_path / "speed.json")
    numbers, _ = planned("STACK=A (A)*3@0.5", "MAX_WALLCLOCK_SECONDS=100", speed=path)
    first, second = numbers["step_seconds"]
    assert numbers["shares"] == [0.5, 0.5] and second > 1.5 * first
    assert numbers["steps"] == int(50 / first + 50 / second)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpt, "pack_self", lambda config: b"x" * 1000)
    (tmp_path / "runs").mkdir()
    (tmp_path / "records").mkdir()
    argv = [*SMALL, "--gpus", "8", "--price", "20"]

    def run(*more):
        code = cost.main([*argv, *more], {}, tmp_path)
        return code, *capsys.readouterr()

    assert run()[0] == 2 and run()[2].startswith("--speed: nothing is measured yet; ./run.sh bench speed --json ")
    slow = speed_file(tmp_path / "records" / "slow.json", seconds=0.5)
    fast = speed_file(tmp_path / "runs" / "fast.json")
    (tmp_path / "runs" / "other.json").write_text("{}")
    os.utime(slow, (1, 1))
    code, out, _ = run("--json", str(tmp_path / "plan.json"))
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert code == 0 and f"speed: {fast}, compiled" in out and "money, 3 seeds" in out
    assert numbers["price"] > 0 and numbers["total_bytes"] > 1000
    os.utime(fast, (0, 0))
    assert f"speed: {slow}" in run()[1], "the newest"
    assert f"speed: {fast}" in run("--speed", str(fast))[1]
    os.utime(fast)
    here = speed_file(tmp_path / "cpu.json", gpu="")
    for more, code, said in (
            (["--speed", str(here)], 2, f"--gpus: 8: {here} was measured on 16 cores of a CPU; --speed names one of a "
             "GPU"),
            (["--speed", str(tmp_path / "plan.json")], 2, f"--speed: {tmp_path}/plan.json: must be a JSON of ./run.sh "
             "bench speed ('tables')"),
            (["--gpus", "3"], 2, "--gpus: 3: must divide the 8 micro-batches of a step (TRAIN_BATCH_TOKENS over "
             "MICRO_BATCH_TOKENS=1024)"),
            (["--price", "-1"], 2, "--price: -1: must be a number of at least 0"),
            (["MODEL_DM=3"], 2, "MODEL_DM=3: not a setting; did you mean MODEL_DIM?"),
            (["TARGET_BYTES=2000"], 3, "TARGET_BYTES=2000: the artifact is forecast to have "),
            (["EVAL_BUDGET_SECONDS=0.001"], 3, "EVAL_BUDGET_SECONDS=0.001: the evaluation is forecast to take "),
            (["MAX_WALLCLOCK_SECONDS=0.001"], 3, "MAX_WALLCLOCK_SECONDS=0.001: does not hold a step")):
        found, _, err = run(*more)
        assert (found, err.startswith(said), len(err.splitlines())) == (code, True, 1), err


def test_a_compiled_step_is_taken_before_an_eager_one(tmp_path):
    eager = json.loads(speed_file(tmp_path / "a.json", kind="eager", seconds=0.2).read_text())
    both = json.loads(speed_file(tmp_path / "b.json").read_text())
    for tables in (eager["tables"] + both["tables"], both["tables"] + eager["tables"]):
        path = tmp_path / "both.json"
        path.write_text(json.dumps({"machine": both["machine"], "tables": tables}))
        found = cost.read_speed(path)
        assert found.compiled and len(found.paces) == 1
        assert found.paces[0].flops / found.paces[0].rate == pytest.approx(0.05)


def test_titles_are_those_of_bench_speed():
    """What tools/speed.py writes is what is read here."""
    from tools import speed

    config = gpt.load_config([*SMALL, "OVERLAY=tiny"], {}, gpus=0)
    options = {"COMPILED": "0", "REPEATS": 1, "BUDGET_SECONDS": 0.01, "DOCUMENT_TOKENS": 200.0, "PARTS": ("step",)}
    titles = [title for title, *_ in speed.Speed(config, options).tables()]
    assert any(cost.TITLE.match(title) for title in titles)
    assert {"s round", "s optimizer", "TFLOP/step", "s first"} <= {*speed.STEP_COLUMNS}
