"""EVALUATORS that are killed, shared and hurried: two ranks are one, a journal goes on, the forecast holds."""

import json
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FITTING, clean_env, small_words
from test_13_ttt import BOS, PHASED, documents, shaken, stream, tiny

import train_gpt
from train_gpt import (
    EVALUATORS,
    CheckError,
    Frozen,
    Pace,
    Referee,
    Round,
    Window,
    World,
    load_config,
    load_data,
    main,
    make_guest,
    make_world,
    rehearse,
    score,
    shrink_to_fit,
    with_settings,
)

HERE = Path(__file__).parent
STEPS = {"NGRAM_CHUNK_TOKENS": 70, "TTT_LORA_LR": 0.003, "TTT_BATCH_SIZE": 2, "EVAL_BATCH_TOKENS": 48}
# Every evaluator as it comes, and the declared modes, which have several stages or a state that goes on.
ROWS = {**{kind: (kind, FITTING.get(kind, {})) for kind in EVALUATORS},
        "warm": ("ttt", {"TTT_WARM_START_A": 1}), "phased": ("ttt", {**PHASED, "GLOBAL_TTT_LR": 0.01}),
        "phased, warm": ("ttt", {**PHASED, "TTT_WARM_START_A": 1, "TTT_POLYAK_DECAY": 0.5, "TTT_GRAD_STEPS": 2})}


class Stop(Exception):
    """The kill, in a test."""


def config_of(row, **more):
    kind, mode = ROWS[row]
    return tiny(**{"EVAL": kind, **STEPS, **mode, **more})


def jobs_of(row, val, **more):
    """Numbers of all jobs of a row."""
    stages = EVALUATORS[ROWS[row][0]].plan(val.tokens, config_of(row, **more))
    return [(number, job) for number, stage in enumerate(stages) for job in range(len(stage))]


def play_row(row, world=None, journal=None, val=None, model=None, watch=None, clock=lambda: 0.0, deadline=math.inf,
             **more):
    """One score, its model and its guest made for it."""
    config, world, val = config_of(row, **more), world or World(), val or stream(documents())
    guest = make_guest(ROWS[row][0], model or shaken(config), config, world, -1)
    return score(ROWS[row][0], guest, val, config, world, clock, journal, watch, deadline)


def after(calls):
    """A watch that kills the score at its so-manieth question."""
    left = [calls]

    def watch(at, values):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
    return watch


def stopped(row, journal, calls, **more):
    """Play a row until the kill."""
    with pytest.raises(Stop):
        play_row(row, journal=journal, watch=after(calls), **more)


@pytest.fixture
def plays(monkeypatch):
    """The numbers of the jobs that are played."""
    played, lock, real = [], threading.Lock(), Referee.play

    def play(self, guest, number, job):
        with lock:
            played.append(number)
        return real(self, guest, number, job)
    monkeypatch.setattr(Referee, "play", play)
    return played


def same(found, wanted):
    """The same bits of every target, the same story of scores and updates."""
    assert np.array_equal(found.by_target, wanted.by_target)
    assert found.ledger == wanted.ledger and found.journal == wanted.journal
    assert (found.bytes, found.documents) == (wanted.bytes, wanted.documents)


def records(folder, kind="*"):
    """The heads of all whole records of a journal folder."""
    heads = []
    for path in sorted(folder.glob(f"{kind}.*.journal")):
        data, at = path.read_bytes(), 0
        while (end := data.find(b"\n", at)) >= 0:
            if data[at:end]:
                heads.append(json.loads(data[at:end]))
                end += heads[-1]["bytes"]
            at = end + 1
    return heads


@pytest.fixture(scope="module")
def straight():
    """Every row's score by one rank without a journal."""
    return {row: play_row(row) for row in ROWS}


def calls_of(row):
    """How often a watch is called in the whole score of a row."""
    config, count = config_of(row), 0
    for stage in EVALUATORS[ROWS[row][0]].plan(stream(documents()).tokens, config):
        count += sum(len(item.windows) if row == "ngram" else 1 for job in stage for item in job)
    return count


# -- two ranks


def jobs_in(folder):
    return {tuple(head["job"]) for head in records(folder)}


def play_rank(folder):
    """What each of two ranks does in a process of its own: all rows; the rest of what one rank left; and a part for
    one rank to go on from, as if both were killed."""
    torch.set_num_threads(1)
    world, folder, results = make_world(os.environ), Path(folder), {}
    real, played, spare = Referee.play, [], [math.inf, 0]

    def play(self, guest, number, job):
        if number[0] == spare[1]:
            spare[0] -= 1
        if spare[0] < 0:
            raise Stop
        played.append(number)
        return real(self, guest, number, job)
    Referee.play = play
    for row in ROWS:
        results[row] = play_row(row, world)
        played.clear()
        results[row, "from one"] = play_row(row, world, folder / "one" / row)
        results[row, "from one", "played"] = world.gather(list(played))
        # The last stage that both have work in, so that neither waits for the other.
        stages = EVALUATORS[ROWS[row][0]].plan(stream(documents()).tokens, config_of(row))
        stage = max(number for number, jobs in enumerate(stages) if min(map(len, train_gpt.assign(jobs, 2))) > 0)
        spare[:] = [min(map(len, train_gpt.assign(stages[stage], 2))) - 1, stage]
        try:
            play_row(row, world, folder / "two" / row)
        except Stop:
            results[row, "stopped"] = True
        spare[:] = [math.inf, 0]
        world.barrier()
    if world.first:
        (folder / "results.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes over Gloo, once for all rows: (folder, results)."""
    folder = tmp_path_factory.mktemp("pair")
    for row in ROWS:
        stopped(row, folder / "one" / row, calls_of(row) // 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**clean_env(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    ranks = [subprocess.Popen([sys.executable, "-c", f"import test_13_resume as t; t.play_rank({str(folder)!r})"],
                              env={**env, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    try:
        said = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return folder, pickle.loads((folder / "results.pickle").read_bytes())


@pytest.mark.dist
@pytest.mark.parametrize("row", ROWS)
def test_two_ranks_score_what_one_scores(straight, pair, row):
    """Every target's nats to 1e-9, and the same ledger."""
    found, wanted = pair[1][row], straight[row]
    assert np.abs(found.by_target - wanted.by_target).max() <= 1e-9
    assert found.ledger == wanted.ledger and found.journal == wanted.journal


@pytest.mark.dist
@pytest.mark.parametrize("row", ROWS)
def test_two_ranks_go_on_from_one(straight, pair, row):
    """They play what is missing, each job once, and get the same score."""
    folder, results = pair
    found, wanted = results[row, "from one"], straight[row]
    assert np.abs(found.by_target - wanted.by_target).max() <= 1e-9 and found.ledger == wanted.ledger
    everything = jobs_of(row, stream(documents()))
    # The folder now holds the first part too: all jobs, each once.
    heads = [tuple(head["job"]) for head in records(folder / "one" / row)]
    assert sorted(heads) == everything
    played = [job for part in results[row, "from one", "played"] for job in part]
    assert sorted(played + [job for job in heads if job not in played]) == everything
    assert len(set(played)) == len(played) and (len(played) < len(everything) or len(everything) < 3)


@pytest.mark.dist
@pytest.mark.parametrize("row", ROWS)
def test_one_rank_goes_on_from_the_files_of_two(straight, pair, plays, row, tmp_path):
    folder, results = pair
    assert results[row, "stopped"]
    shutil.copytree(folder / "two" / row, tmp_path / "j")
    done = jobs_in(tmp_path / "j")
    assert len(list((tmp_path / "j").iterdir())) == 2
    found = play_row(row, journal=tmp_path / "j")
    assert np.abs(found.by_target - straight[row].by_target).max() <= 1e-9
    assert found.ledger == straight[row].ledger
    assert sorted(plays) == sorted(set(jobs_of(row, stream(documents()))) - done)


# -- a journal goes on


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("share", [0.25, 0.8])
def test_a_killed_score_goes_on(straight, plays, tmp_path, row, share):
    """Whenever it is killed, twice if need be: the same bits, ledger and updates; only what is missing is played."""
    everything = jobs_of(row, stream(documents()))
    stopped(row, tmp_path / "j", round(share * calls_of(row)))
    first = jobs_in(tmp_path / "j")
    assert first == set(plays[:-1]) and len(first) < len(everything)
    stopped(row, tmp_path / "j", 0)
    assert jobs_in(tmp_path / "j") == first
    plays.clear()
    same(play_row(row, journal=tmp_path / "j"), straight[row])
    assert sorted(plays) == sorted(set(everything) - first)
    plays.clear()
    same(play_row(row, journal=tmp_path / "j"), straight[row])
    assert plays == []


def test_a_killed_update_between_phases_is_made_again(straight, plays, tmp_path, monkeypatch):
    """Killed after all jobs of a stage, within the update that follows."""
    real = train_gpt.TestTime.absorb

    def absorb(self, told):
        if told.low > 1:
            raise Stop
        return real(self, told)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train_gpt.TestTime, "absorb", absorb)
        play_row("phased", journal=tmp_path)
    assert {stage for stage, _ in jobs_in(tmp_path)} == {0, 1}
    plays.clear()
    same(play_row("phased", journal=tmp_path), straight["phased"])
    assert {stage for stage, _ in plays} == {2}


OTHER = {"a rate": ("ttt", {"TTT_LORA_LR": 0.004}), "seed": ("ttt", {"SEED": 5}),
         "a stride": ("sliding", {"EVAL_STRIDE": 7}), "isolation": ("contiguous", {"DOC_ISOLATION": 0}),
         "a discount": ("ngram", {"NGRAM_DISCOUNT": 0.4}), "a gate": ("ngram", {"NGRAM_GATE": "entropy"})}


@pytest.mark.parametrize("what", OTHER)
def test_a_journal_of_other_settings_is_ignored(plays, tmp_path, what):
    row, more = OTHER[what]
    everything = jobs_of(row, stream(documents()), **more)
    stopped(row, tmp_path, calls_of(row) // 2)
    assert jobs_in(tmp_path)
    plays.clear()
    found = play_row(row, journal=tmp_path, **more)
    assert sorted(plays) == everything
    same(found, play_row(row, **more))
    # What stood there is still of use to its own settings.
    plays.clear()
    play_row(row, journal=tmp_path)
    assert 0 < len(plays) < len(jobs_of(row, stream(documents())))


def test_a_journal_of_other_weights_or_tokens_is_ignored(straight, plays, tmp_path):
    whole = play_row("document", journal=tmp_path)
    model = shaken(config_of("document"))
    with torch.no_grad():
        model.tok_emb[40, 3] += 1e-3
    val, count = stream(documents()), len(plays)
    tokens = val.tokens.copy()
    tokens[-2] = 4 + (tokens[-2] - 3) % 40
    for more in ({"model": model}, {"val": val._replace(tokens=tokens)}):
        plays.clear()
        found = play_row("document", journal=tmp_path, **more)
        assert len(plays) == count and not np.array_equal(found.by_target, whole.by_target)
    plays.clear()
    same(play_row("document", journal=tmp_path), straight["document"])
    assert plays == []


@pytest.mark.parametrize("more", [{"EVAL_BUDGET_SECONDS": 1234}, {"EVAL_SHRINK": 1}, {"AUDIT": 1}, {"THREADS": 2}])
def test_what_changes_no_score_keeps_the_journal(straight, plays, tmp_path, more):
    """The line that ends an evaluation over its budget promises that it goes on with a larger one."""
    play_row("document", journal=tmp_path)
    plays.clear()
    same(play_row("document", journal=tmp_path, **more), straight["document"])
    assert plays == []


def written(folder, row="sliding"):
    """The bytes of a finished journal, and where each record ends."""
    play_row(row, journal=folder)
    [path] = folder.iterdir()
    data, ends = path.read_bytes(), []
    for head in records(folder):
        at = data.index(b'"crc": ' + str(head["crc"]).encode()) if ends else 0
        ends.append(data.index(b"\n", at) + 1 + head["bytes"])
    return path, data, ends


def test_a_tail_that_was_cut_off_is_played_again(straight, plays, tmp_path):
    """At any byte; and what is then added behind the cut is read the next time."""
    path, data, ends = written(tmp_path / "j")
    everything = jobs_of("sliding", stream(documents()))
    rng = np.random.default_rng(0)
    cuts = {0, 1, len(data) - 1, len(data) - 2, *ends, *(end + 1 for end in ends[:-1]), *(end - 1 for end in ends),
            *rng.integers(0, len(data), 40).tolist()}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        plays.clear()
        same(play_row("sliding", journal=tmp_path / "j"), straight["sliding"])
        assert len(plays) == len(everything) - sum(end <= cut for end in ends), cut
        plays.clear()
        same(play_row("sliding", journal=tmp_path / "j"), straight["sliding"])
        assert plays == [], cut


def test_a_flipped_bit_changes_no_score(straight, tmp_path):
    """Anywhere, in numbers or in what is said about them: the record is dropped, or nothing was lost."""
    path, data, ends = written(tmp_path / "j")
    rng = np.random.default_rng(1)
    spots = set(rng.integers(0, len(data), 40).tolist())
    start = 0
    for end in ends[:3]:
        # Heads are short beside the numbers, and say most.
        spots |= set(range(start, data.index(b"\n", start + 1), 3))
        start = end
    wrong = []
    for spot in sorted(spots):
        flipped = bytearray(data)
        flipped[spot] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(bytes(flipped))
        try:
            same(play_row("sliding", journal=tmp_path / "j"), straight["sliding"])
        except (AssertionError, ValueError, TypeError, KeyError, CheckError) as error:
            wrong.append((spot, data[max(0, spot - 12):spot + 4], type(error).__name__))
    assert not wrong, (len(wrong), len(spots), wrong[:6])


@pytest.mark.parametrize("junk", [b"", b"\n\n\n", b"{}\n", b"[1]\n", b"null\n", b"\xff\xfe\n", b'{"bytes": -5}\n',
                                  b'{"bytes": "x", "key": 1}\n', os.urandom(300)])
def test_junk_in_a_journal_is_passed_over(straight, plays, tmp_path, junk):
    path, data, _ = written(tmp_path / "j")
    for raw in (junk + b"\n" + data, data + junk, junk):
        path.write_bytes(raw)
        plays.clear()
        same(play_row("sliding", journal=tmp_path / "j"), straight["sliding"])
        assert bool(plays) == (raw == junk)


def test_files_of_several_ranks_are_merged(straight, plays, tmp_path):
    """Each record once, whoever wrote it; a job that stands in two files counts once."""
    folder = tmp_path / "j"
    path, data, ends = written(folder)
    half = ends[len(ends) // 2]
    path.write_bytes(data[:half])
    (folder / "sliding.1.journal").write_bytes(data[half + 1:])
    (folder / "sliding.7.journal").write_bytes(data)
    plays.clear()
    same(play_row("sliding", journal=folder), straight["sliding"])
    assert plays == []
    (folder / "sliding.7.journal").unlink()
    same(play_row("sliding", journal=folder), straight["sliding"])
    assert plays == []
    path.unlink()
    same(play_row("sliding", journal=folder), straight["sliding"])
    assert len(plays) == len(ends) // 2 + 1


class Ticks:
    """A clock of which every look costs a second."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        self.now += 1
        return self.now


def test_seconds_before_the_kill_count(tmp_path):
    stopped("document", tmp_path, 6, clock=Ticks())
    earlier = max(head["seconds"] for head in records(tmp_path))
    clock = Ticks()
    found = play_row("document", journal=tmp_path, clock=clock)
    assert found.earlier == earlier > 0
    assert found.seconds == earlier + clock.now - 1001
    assert found.entry()["seconds"] == found.seconds
    # Killed again and again, seconds only grow.
    assert play_row("document", journal=tmp_path, clock=Ticks()).earlier > earlier
    assert play_row("document", clock=Ticks()).earlier == 0


# -- the deadline


def test_the_deadline_ends_the_score_between_rounds_and_keeps_what_is_done(straight, plays, tmp_path):
    with pytest.raises(CheckError, match="^EVAL_BUDGET_SECONDS=7: spent") as caught:
        play_row("ttt", journal=tmp_path, clock=Ticks(), deadline=1025.0, EVAL_BUDGET_SECONDS=7)
    assert len(str(caught.value).splitlines()) == 1
    done = jobs_in(tmp_path)
    assert 0 < len(done) < len(jobs_of("ttt", stream(documents())))
    plays.clear()
    same(play_row("ttt", journal=tmp_path, EVAL_BUDGET_SECONDS=7), straight["ttt"])
    assert not done & set(plays)


def test_after_the_deadline_nothing_is_asked(tmp_path):
    asked = []
    with pytest.raises(CheckError, match="EVAL_BUDGET_SECONDS"):
        play_row("sliding", clock=lambda: 5.0, deadline=4.0, watch=lambda at, values: asked.append(at))
    assert asked == []
    play_row("sliding", clock=lambda: 5.0, deadline=5.0)


# -- the forecast


class Stopwatched(Frozen):
    """A guest that takes a made-up time for each round, and keeps what it was asked."""

    def __init__(self, config, base=0.25, each=0.001):
        self.config, self.base, self.each, self.now, self.asks = config, base, each, 0.0, []
        self.learned = 0

    def predict(self, state, ask, offer):
        self.asks.append(ask)
        self.now += self.base + self.each * ask.tokens.numel()
        offer(torch.zeros(len(ask.places), self.config.data.vocab_size))

    def learn(self, state, ask, targets):
        self.learned += 1
        return True


def rehearsed(row, val, **more):
    config = config_of(row, **more)
    guest, kind = Stopwatched(config), ROWS[row][0]
    return guest, rehearse(kind, guest, EVALUATORS[kind].plan(val.tokens, config), config, World(), lambda: guest.now)


@pytest.mark.parametrize("row", ["contiguous", "sliding", "document", "ttt", "phased"])
def test_a_rehearsal_finds_the_pace(row):
    """Seconds for a round and for a position, exactly, where they are all there is."""
    guest, pace = rehearsed(row, stream(documents()))
    assert pace == pytest.approx((0.25, 0.001), rel=1e-6)
    # What learns in the score learns in the rehearsal.
    assert (guest.learned > 0) == (ROWS[row][0] == "ttt")


def test_a_rehearsal_of_a_single_row():
    guest, pace = rehearsed("contiguous", stream(documents((10,))))
    [rows] = {len(ask.windows) for ask in guest.asks}
    assert rows == 1 and 0 < pace.round + 10 * pace.position == pytest.approx(0.26)


@pytest.mark.parametrize("row", ROWS)
def test_a_rehearsal_never_sees_a_validation_token(row):
    """It is the same, question by question, whatever they are; and its own are of the vocabulary."""
    texts, seen = documents(), []
    for shift in (0, 11):
        moved = [[BOS, *(4 + (token - 4 + shift) % 44 for token in text[1:])] for text in texts]
        seen.append(rehearsed(row, stream(moved))[0].asks)
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*seen, strict=True))
    assert all(int(ask.tokens.max()) < 48 for ask in seen[0])


@pytest.mark.parametrize("isolation", [0, 1])
@pytest.mark.parametrize("row", ["contiguous", "sliding", "document", "ttt"])
def test_a_rehearsal_asks_as_the_score_does(row, isolation):
    """With documents where the score has them: else another kernel is timed, and another graph compiled."""
    guest, _ = rehearsed(row, stream(documents()), DOC_ISOLATION=isolation)
    config = config_of(row, DOC_ISOLATION=isolation)
    real = Stopwatched(config)
    real.phase, real.model = 0, shaken(config)
    score(ROWS[row][0], real, stream(documents()), config, World(), lambda: 0.0)
    assert {ask.docs is None for ask in guest.asks} == {ask.docs is None for ask in real.asks}
    widest = max(ask.tokens.numel() for ask in real.asks)
    assert max(ask.tokens.numel() for ask in guest.asks) == widest


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"TTT_POLYAK_DECAY": 0.5, "TTT_GRAD_STEPS": 2}])
def test_a_rehearsal_compiles_all_that_the_score_needs(monkeypatch, more):
    """No graph is made within the score, whatever the rows of its rounds: that would cost its budget minutes on a GPU.
    Traced by torch's own front end, with no compiler behind it."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **words: real(function, **words, backend="eager"))
    config = tiny(STACK="A1", TTT_SITES="q,head", TTT_CHUNK_SIZE=4, TTT_EVAL_SEQ_LEN=12, **more)
    model, val = shaken(config), stream(documents((13, 9, 8, 3, 2)))
    torch._dynamo.reset()
    guest = make_guest("ttt", model, config, World(), -1, compiled=True)
    rehearse("ttt", guest, EVALUATORS["ttt"].plan(val.tokens, config), config, World(), time.monotonic)
    graphs = train_gpt.compiled_graphs()
    found = score("ttt", guest, val, config, World(), lambda: 0.0)
    assert train_gpt.compiled_graphs() == graphs > 0
    plain = score("ttt", make_guest("ttt", model, config, World(), -1), val, config, World(), lambda: 0.0)
    assert np.abs(found.by_target - plain.by_target).max() < 1e-4


def test_a_forecast_is_the_longest_share_of_each_stage():
    def job(*shapes):
        return tuple(Round([Window(0, length, 1)] * rows) for rows, length in shapes)
    pace = Pace(2.0, 0.1)
    stages = [[job((1, 10)), job((2, 20), (1, 20)), job((1, 30))], [job((1, 10))]]
    assert pace.seconds(stages, 1) == pytest.approx(3 + 10 + 5 + 3)
    # The second job, 10 s, against 5 + 3; then the stage of one job, which nobody can share.
    assert pace.seconds(stages, 2) == pytest.approx(10 + 3)
    assert pace.seconds(stages, 9) == pytest.approx(10 + 3)
    assert Pace(0.0, 0.0).seconds(stages, 2) == 0 == pace.seconds([], 3)
    # With the clock that the pace describes, the forecast of one rank is what the score takes.
    config, val = config_of("ttt"), stream(documents())
    guest = Stopwatched(config)
    guest.phase, guest.model = 0, shaken(config)
    found = score("ttt", guest, val, config, World(), lambda: guest.now)
    assert Pace(0.25, 0.001).seconds(EVALUATORS["ttt"].plan(val.tokens, config), 1) == pytest.approx(found.seconds)


def totals(config, tokens, paces):
    return sum(pace.seconds(EVALUATORS[kind].plan(tokens, config), 1) for kind, pace in paces.items())


@pytest.mark.parametrize("kinds", [("sliding",), ("ttt",), ("contiguous", "sliding", "ttt"), ("document", "ttt")])
def test_shrinking_stops_as_soon_as_it_fits(kinds):
    """For every budget: what it says fits does, with one step less it would not, and the dearest gave way."""
    tokens = stream(documents()).tokens
    config = tiny(EVAL=",".join(kinds), EVAL_STRIDE=3, TTT_CHUNK_SIZE=4, TTT_SHORT_SCORE_FIRST_STEPS="9:2")
    paces = {kind: Pace(0.5, 0.01 if kind == "sliding" else 0.02) for kind in kinds}
    full = totals(config, tokens, paces)
    cheapest, _ = shrink_to_fit(config, tokens, paces, 1, 0.0)
    least = totals(with_settings(config, cheapest), tokens, paces)
    assert least < full
    assert all(shrink_to_fit(config, tokens, paces, 1, seconds)[0] == {} for seconds in (full, math.inf))
    seen = []
    for budget in np.linspace(full, least, 9)[1:]:
        changes, forecast = shrink_to_fit(config, tokens, paces, 1, float(budget) + 1e-6)
        after = with_settings(config, changes)
        assert changes and set(changes) <= {"EVAL_STRIDE", "TTT_CHUNK_SIZE", "TTT_SHORT_SCORE_FIRST_STEPS"}
        assert sum(forecast.values()) == pytest.approx(totals(after, tokens, paces)) and set(forecast) == set(kinds)
        assert sum(forecast.values()) <= budget + 1e-6
        seen.append(totals(after, tokens, paces))
    assert seen == sorted(seen, reverse=True) and len(set(seen)) > 2
    # Step by step: each budget just below a total takes one step more.
    changes, path = {}, [full]
    while path[-1] > least:
        changes, forecast = shrink_to_fit(config, tokens, paces, 1, path[-1] * (1 - 1e-9))
        path.append(sum(forecast.values()))
    assert changes == cheapest and len(path) > 3


def test_the_dearest_gives_way_first():
    tokens, config = stream(documents()).tokens, tiny(EVAL_STRIDE=3, TTT_CHUNK_SIZE=4)
    for dear, cheap, names in (("sliding", "ttt", {"EVAL_STRIDE"}), ("ttt", "sliding", {"TTT_CHUNK_SIZE"})):
        paces = {dear: Pace(1.0, 0.0), cheap: Pace(0.1, 0.0), "contiguous": Pace(100.0, 0.0)}
        full = totals(config, tokens, paces)
        assert set(shrink_to_fit(config, tokens, paces, 1, full - 1)[0]) == names


def test_shrinking_gives_up_with_the_cheapest_there_is():
    tokens, paces = stream(documents()).tokens, {"sliding": Pace(1, 1), "ttt": Pace(1, 1)}
    config = tiny(EVAL_STRIDE=3, TTT_CHUNK_SIZE=4, TTT_SHORT_SCORE_FIRST_STEPS="9:2")
    changes, forecast = shrink_to_fit(config, tokens, paces, 1, 1e-3)
    assert changes == {"EVAL_STRIDE": 24, "TTT_CHUNK_SIZE": 24, "TTT_SHORT_SCORE_FIRST_STEPS": ""}
    assert sum(forecast.values()) > 1e-3
    assert shrink_to_fit(config, tokens, {"contiguous": Pace(1, 1)}, 1, 1e-3)[0] == {}


# -- through main


SCORED = {"PRESET": "baseline", "ITERATIONS": 2, "EVAL": "contiguous,sliding", "EVAL_STRIDE": 8, "TTT_CHUNK_SIZE": 8,
          "TTT_EVAL_SEQ_LEN": 32, "TTT_BATCH_SIZE": 2, "CODEC": "zlib"}


@pytest.fixture(scope="module")
def runs(mini, tmp_path_factory):
    """A folder with one run that is trained and written, not yet scored."""
    folder = tmp_path_factory.mktemp("scored")
    assert main(small_words(mini, folder, RUN_ID="old", STAGES="train,write", **SCORED), {}) == 0
    return folder


def words(mini, runs, **more):
    return small_words(mini, runs, STAGES="evaluate", **{**SCORED, **more})


def result(runs, name):
    return json.loads((runs / name / "result.json").read_text())


def run(given, code, capsys):
    assert main(given, {}) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.strip().splitlines()) == (1 if code else 0)
    return said


def test_an_evaluation_killed_by_the_system_goes_on(mini, tmp_path, capsys):
    """kill -9 within the second evaluator; the same words again end in the scores of a run that nobody disturbed."""
    more = {"EVAL": "contiguous,ttt", "TTT_CHUNK_SIZE": 16}
    begun = small_words(mini, tmp_path, RUN_ID="killed", **{**SCORED, **more}, STAGES="train,write")
    assert main(begun, {}) == 0
    shutil.copytree(tmp_path / "killed", tmp_path / "quiet")
    run(words(mini, tmp_path, RUN_ID="quiet", **more), 0, capsys)
    again = words(mini, tmp_path, RUN_ID="killed", **more)
    folder = tmp_path / "killed" / "journal"
    path = folder / "ttt.0.journal"
    with subprocess.Popen([sys.executable, "train_gpt.py", *again], cwd=HERE.parent, env=clean_env(),
                          stdout=subprocess.DEVNULL) as child:
        for _ in range(12000):
            if child.poll() is not None or path.exists() and path.stat().st_size:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    kept = {kind: [head["seconds"] for head in records(folder, kind)] for kind in ("contiguous", "ttt")}
    tokens = load_data(load_config(again, {}, gpus=0).data, World()).val.tokens
    count = len(EVALUATORS["ttt"].plan(tokens, load_config(again, {}, gpus=0))[0])
    assert len(kept["contiguous"]) > 0 and 0 < len(kept["ttt"]) < count, (kept, count)
    assert "scores" not in result(tmp_path, "killed")
    began = time.monotonic()
    run(again, 0, capsys)
    own = time.monotonic() - began
    quiet, found = result(tmp_path, "quiet"), result(tmp_path, "killed")
    for kind in ("contiguous", "ttt"):
        assert abs(found["scores"][kind]["val_loss"] - quiet["scores"][kind]["val_loss"]) <= 1e-9
        assert found["scores"][kind]["seconds"] > max(kept[kind])
    assert found["ledger"] == quiet["ledger"] and quiet["ledger"]["updates"] > 0
    assert sum(map(max, kept.values())) < found["eval_seconds"] < sum(map(max, kept.values())) + own
    assert not folder.exists() and not (tmp_path / "quiet" / "journal").exists()
    tables = [np.load(tmp_path / name / "documents.npz") for name in ("quiet", "killed")]
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0].files)


@pytest.fixture
def paced(monkeypatch):
    """Every position takes a millisecond in the forecast, and every rehearsal is noted."""
    seen = []

    def pretend(kind, *rest):
        seen.append(kind)
        return Pace(0.0, 1e-3)
    monkeypatch.setattr(train_gpt, "rehearse", pretend)
    return seen


def forecast_of(mini, **more):
    """Seconds of the evaluation under that pace."""
    config = load_config(small_words(mini, "none", **{**SCORED, **more}), {}, gpus=0)
    tokens = load_data(config.data, World()).val.tokens
    return totals(config, tokens, {kind: Pace(0.0, 1e-3) for kind in config.eval.eval})


def again(runs, name, source="old", **more):
    """The words that score another run's artifact, all else as it was there."""
    given = {"RUNS_PATH": runs, "RUN_ID": name, "STAGES": "evaluate", "FROM": runs / source, "PACK": 0, "THREADS": 1,
             "TENSORBOARD": 0, **more}
    return [f"{name}={value}" for name, value in given.items()]


def test_over_the_budget_is_refused_with_settings_that_fit(mini, runs, paced, capsys):
    budget = round(forecast_of(mini, EVAL_STRIDE=32) + 1)
    assert forecast_of(mini, EVAL_STRIDE=16) > budget
    said = run(again(runs, "over", EVAL_BUDGET_SECONDS=budget), 3, capsys)
    assert said.startswith(f"EVAL_BUDGET_SECONDS={budget}: the evaluation would take {forecast_of(mini):.0f} s")
    assert "EVAL_STRIDE=32 would take" in said and "EVAL_SHRINK=1" in said
    assert paced == ["contiguous", "sliding"]
    assert not (runs / "over" / "documents.npz").exists()
    assert "eval_shrunk" not in (runs / "over" / "config.json").read_text()
    # Where nothing fits, the line names the cheapest and what it would take; EVAL_SHRINK does not help.
    for shrink in (0, 1):
        said = run(again(runs, f"never{shrink}", EVAL_BUDGET_SECONDS=0.5, EVAL_SHRINK=shrink), 3, capsys)
        assert "with the cheapest settings (EVAL_STRIDE=64)" in said and "name fewer evaluators in EVAL" in said
        assert "eval_shrunk" not in (runs / f"never{shrink}" / "config.json").read_text()


def sliding(runs, name):
    return result(runs, name)["scores"]["sliding"]["val_loss"]


def log(runs, name):
    return (runs / name / "train.log").read_text()


@pytest.fixture(scope="module")
def fitted(mini, runs):
    """The budget, a run that EVAL_SHRINK fitted into it, and scores with each stride: stride -> nats a target."""
    budget = round(forecast_of(mini, EVAL_STRIDE=32) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "rehearse", lambda *rest: Pace(0.0, 1e-3))
        assert main(again(runs, "fits", EVAL_SHRINK=1, EVAL_BUDGET_SECONDS=budget), {}) == 0
        for stride in (8, 16, 32):
            assert main(again(runs, f"plain{stride}", EVAL_STRIDE=stride, EVAL_BUDGET_SECONDS=0), {}) == 0
    plain = {stride: sliding(runs, f"plain{stride}") for stride in (8, 16, 32)}
    assert len(set(plain.values())) == 3
    return plain


def test_settings_that_fit_are_taken_and_kept(runs, fitted):
    assert sliding(runs, "fits") == fitted[32]
    assert json.loads((runs / "fits" / "config.json").read_text())["eval_shrunk"] == {"EVAL_STRIDE": 32}
    assert "EVAL_SHRINK: EVAL_STRIDE=32, forecast" in log(runs, "fits")


def test_a_run_that_goes_on_takes_the_kept_settings(runs, fitted, paced, capsys):
    """Under the same name and budget, now without EVAL_SHRINK."""
    shutil.copytree(runs / "fits", runs / "fits2")
    budget = json.loads((runs / "fits" / "config.json").read_text())["settings"]["EVAL_BUDGET_SECONDS"]
    run(again(runs, "fits2", EVAL_BUDGET_SECONDS=budget), 0, capsys)
    assert sliding(runs, "fits2") == fitted[32]
    assert log(runs, "fits2").count("EVAL_SHRINK: as before, EVAL_STRIDE=32") == 1


def test_a_run_that_comes_from_it_takes_them_and_hands_them_on(runs, fitted, paced, capsys):
    """Also in the third generation: what was once compared stays comparable."""
    run(again(runs, "child", "fits"), 0, capsys)
    assert sliding(runs, "child") == fitted[32]
    assert "EVAL_SHRINK: as before, EVAL_STRIDE=32" in log(runs, "child")
    run(again(runs, "grandchild", "child"), 0, capsys)
    assert sliding(runs, "grandchild") == fitted[32]


def test_words_win_over_kept_settings(runs, fitted, paced, capsys):
    run(again(runs, "word", "fits", EVAL_STRIDE=16, EVAL_BUDGET_SECONDS=0), 0, capsys)
    assert sliding(runs, "word") == fitted[16] and "as before" not in log(runs, "word")
    assert main(again(runs, "variable", "fits", EVAL_BUDGET_SECONDS=0), {"EVAL_STRIDE": "8"}) == 0
    assert sliding(runs, "variable") == fitted[8]


def test_kept_settings_that_contradict_a_word_are_no_crash(runs, fitted, paced, capsys):
    """EVAL_STRIDE=32 is kept, EVAL_SEQ_LEN=16 is said: a score, or one line."""
    code = main(again(runs, "narrow", "fits", EVAL_SEQ_LEN=16, EVAL_STRIDE=16, EVAL_BUDGET_SECONDS=0), {})
    assert code == 0
    code = main(again(runs, "narrower", "fits", EVAL_SEQ_LEN=16, EVAL_BUDGET_SECONDS=0), {})
    said = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in said and len(said.strip().splitlines()) == (code > 0)


def test_a_larger_budget_goes_on_under_the_same_name(runs, paced, plays, capsys, monkeypatch):
    """As the line says that ends an evaluation at its deadline."""
    real, given = train_gpt.score, {"EVAL": "sliding"}
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "score", lambda *rest, **more: real(
            *rest, **{**more, "watch": after(3)}) if "deadline" in more else real(*rest, **more))
        with pytest.raises(Stop):
            main(again(runs, "more", EVAL_BUDGET_SECONDS=10_000, **given), {})
    done = jobs_in(runs / "more" / "journal")
    assert done
    plays.clear()
    run(again(runs, "more", EVAL_BUDGET_SECONDS=20_000, **given), 0, capsys)
    assert plays and not done & set(plays)


def test_the_result_has_the_seconds_before_a_kill_of_every_evaluator(runs, paced, capsys, monkeypatch):
    real = train_gpt.score
    monkeypatch.setattr(train_gpt, "score", lambda *rest, **more: real(*rest, **more)._replace(earlier=1000.0))
    run(again(runs, "earlier", EVAL_BUDGET_SECONDS=0), 0, capsys)
    assert 2000 < result(runs, "earlier")["eval_seconds"] < 2100
    # And of its budget they are spent.
    said = run(again(runs, "spent", EVAL_BUDGET_SECONDS=900), 3, capsys)
    assert said.startswith("EVAL_BUDGET_SECONDS=900: spent")


def test_at_the_deadline_the_run_ends_with_one_line_and_keeps_its_journal(runs, paced, capsys, monkeypatch):
    """The forecast said that it fits, and it took longer."""
    real = train_gpt.score
    monkeypatch.setattr(train_gpt, "score", lambda *rest, **more: real(
        *rest[:5], Ticks(), *rest[6:], **{**more, "deadline": 1030.0}))
    said = run(again(runs, "late", EVAL="sliding", EVAL_BUDGET_SECONDS=10_000), 3, capsys)
    assert said.startswith("EVAL_BUDGET_SECONDS=10000: spent, and targets are left")
    assert jobs_in(runs / "late" / "journal")


def test_the_deadline_counts_the_seconds_before_a_kill(tmp_path):
    """A budget that was nearly spent before the kill is nearly spent now."""
    with pytest.raises(CheckError, match="EVAL_BUDGET_SECONDS"):
        play_row("sliding", journal=tmp_path, clock=Ticks(), deadline=1012.0)
    spent, done = max(head["seconds"] for head in records(tmp_path)), jobs_in(tmp_path)
    assert 8 < spent < 13 and done
    with pytest.raises(CheckError, match="EVAL_BUDGET_SECONDS"):
        play_row("sliding", journal=tmp_path, clock=Ticks(), deadline=1001.0 + spent)
    assert jobs_in(tmp_path) == done
