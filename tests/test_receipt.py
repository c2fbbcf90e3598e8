"""Receipts: the chained event log, what it binds, and the signature; the loss beside a reference run's."""

import json
import shutil

import pytest
from conftest import events, small_words

import train_gpt
from tools import receipt
from train_gpt import CHAIN, Log, link, main, mean_loss, reference_losses

STAGES = "train,calibrate,write,reload,evaluate,report"
WORDS = {"PRESET": "baseline", "STACK": "A", "EVAL": "contiguous"}


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory):
    """A run with all stages, signed."""
    runs = tmp_path_factory.mktemp("receipts")
    words = small_words(mini, runs, **WORDS, ITERATIONS=24, STAGES=STAGES, SIGN_KEY=runs / "key.pem")
    assert main([*words, "RUN_ID=whole"], {}) == 0
    return runs / "whole"


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_whole_run_fits_together(finished):
    assert receipt.check(finished) == []
    held = json.loads((finished / "receipt.json").read_text())
    result = json.loads((finished / "result.json").read_text())
    assert held["artifact_sha256"] == result["artifact"]["sha256"] and held["config_hash"] == result["config_hash"]
    assert len(held["public_key"]) == 64 and len(held["signature"]) == 128
    assert (finished.parent / "key.pem").stat().st_mode & 0o777 == 0o600
    assert receipt.main(["--check", str(finished)]) == 0


def lines_of(folder):
    return (folder / "events.jsonl").read_text().splitlines()


def write_lines(folder, lines):
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")


def edited(folder):
    write_lines(folder, [line.replace('"train_loss": ', '"train_loss": 1', 1) if '"step": 7,' in line else line
                         for line in lines_of(folder)])


def dropped(folder):
    write_lines(folder, [line for line in lines_of(folder) if '"step": 7,' not in line])


def moved(folder):
    lines = lines_of(folder)
    lines[8], lines[9] = lines[9], lines[8]
    write_lines(folder, lines)


def made_up(folder):
    """A line more, with a chain of its own."""
    body = '{"event": "step", "t": 1}'
    write_lines(folder, [*lines_of(folder), f'{body[:-1]}, "chain": "{link("", body)}"}}'])


def unchained(folder):
    write_lines(folder, [CHAIN.sub("}", line) if '"step": 7,' in line else line for line in lines_of(folder)])


def cut_in_the_middle(folder):
    write_lines(folder, [line[:30] if '"step": 7,' in line else line for line in lines_of(folder)])


def ended_early(folder):
    write_lines(folder, lines_of(folder)[:-1])


def better_score(folder):
    result = json.loads((folder / "result.json").read_text())
    result["scores"]["contiguous"]["val_bpb"] -= 0.01
    (folder / "result.json").write_text(json.dumps(result))


def whole_new_chain(folder):
    """Everything made anew around a better score: only the signature tells."""
    better_score(folder)
    digest = train_gpt.result_digest(json.loads((folder / "result.json").read_text()))
    chain, lines = "", []
    for line in lines_of(folder):
        event = json.loads(line)
        del event["chain"]
        if event["event"] == "result":
            event["result_sha256"] = digest
        body = json.dumps(event)
        chain = link(chain, body)
        lines.append(f'{body[:-1]}, "chain": "{chain}"}}')
    write_lines(folder, lines)
    held = json.loads((folder / "receipt.json").read_text())
    (folder / "receipt.json").write_text(json.dumps({**held, **receipt.facts(folder)[0]}))


def other_artifact(folder):
    (folder / "artifact.bin").write_bytes((folder / "artifact.bin").read_bytes() + b"x")


def other_script(folder):
    (folder / "train_gpt.py").write_text("print()")


@pytest.mark.parametrize(("spoil", "said"), [
    (edited, "its chain does not follow"), (dropped, "its chain does not follow"), (moved, "its chain does not follow"),
    (made_up, "its chain does not follow"), (unchained, "has no chain"), (cut_in_the_middle, "is cut short, but no"),
    (ended_early, "says nothing of a beginning or of a result"), (better_score, "is not the one that the run wrote"),
    (whole_new_chain, "its signature is not that"), (other_artifact, "artifact.bin: is not the one"),
    (other_script, "train_gpt.py: is not the one that ran")])
def test_what_was_changed_shows(folder, spoil, said, capsys):
    spoil(folder)
    assert any(said in fault for fault in receipt.check(folder))
    assert receipt.main(["--check", str(folder)]) == 3
    assert said in capsys.readouterr().out


def test_a_run_that_goes_on_is_sealed_again(mini, folder, capsys):
    """Evaluated anew, with another stride or without a report, its result is bound again; a signed receipt is only
    replaced by a signed one."""
    words = small_words(mini, folder.parent, **WORDS, ITERATIONS=24, STAGES="evaluate,report", RUN_ID=folder.name)
    signed = (folder / "receipt.json").read_bytes()
    assert main(words, {}) == 0
    assert (folder / "receipt.json").read_bytes() == signed and "was signed by" in (folder / "train.log").read_text()
    assert any("receipt.json: " in fault for fault in receipt.check(folder))
    key = folder.parent / "other.pem"
    assert main([*words, f"SIGN_KEY={key}"], {}) == 0
    assert receipt.check(folder) == [] and receipt.signer(folder) != json.loads(signed)["public_key"]
    capsys.readouterr()
    assert receipt.main(["--check", str(folder)]) == 0
    assert f"signed by {receipt.signer(folder)}" in capsys.readouterr().out


def test_a_key_that_cannot_sign_is_found_before_any_work(mini, tmp_path, capsys):
    (tmp_path / "bad.pem").write_text("nothing")
    words = small_words(mini, tmp_path, **WORDS, ITERATIONS=2, STAGES="train,report", RUN_ID="x")
    assert main([*words, f"SIGN_KEY={tmp_path / 'bad.pem'}"], {}) == 2
    assert "must be a file with an Ed25519 key" in capsys.readouterr().err
    assert not (tmp_path / "x" / "checkpoint.pt").exists()


def test_other_settings_before_anything_was_kept_and_another_script(mini, tmp_path):
    """A run that ended before it held anything may begin anew with other settings; one that goes on may not have had
    another script."""
    words = small_words(mini, tmp_path, **WORDS, STAGES=STAGES, RUN_ID="anew")
    assert main([*words, "ITERATIONS=8", "SYNC_CHECK_EVERY=1", "MATRIX_LR=1e30", "SCALAR_LR=1e30"], {}) != 0
    assert main([*words, "ITERATIONS=8"], {}) == 0
    folder = tmp_path / "anew"
    began = [event["config_hash"] for event in events(folder, "began")]
    assert len(set(began)) == 2 and receipt.check(folder) == []
    chain, lines = "", []
    for line in lines_of(folder):
        event = json.loads(line)
        del event["chain"]
        if event["event"] == "start" and len(lines) > 4:
            lines.append({"event": "began", "t": 0, **{name: event.get(name) for name in receipt.BEGAN}})
        lines.append(event)
    at = max(place for place, event in enumerate(lines) if event["event"] == "step")
    lines.insert(at, {**next(event for event in reversed(lines) if event["event"] == "began"), "code_sha256": "0"})
    texts = []
    for event in lines:
        body = json.dumps(event)
        chain = link(chain, body)
        texts.append(f'{body[:-1]}, "chain": "{chain}"}}')
    write_lines(folder, texts)
    assert "events.jsonl: its processes began with different code_sha256" in receipt.check(folder)


def test_a_reference_with_a_cut_line_and_redone_steps(tmp_path):
    """What came after the checkpoint never happened, nor did an earlier start."""
    steps = [{"event": "step", "step": step, "frac": step / 20, "train_loss": 1.0} for step in range(20)]
    redone = [{**step, "train_loss": 9.0} for step in steps[3:8]]
    lines = [json.dumps(event) for event in ({"event": "start"}, {**steps[4], "train_loss": 7.0}, {"event": "start"},
                                             *steps[:3], *redone, {"event": "resume", "step": 2}, *steps[3:])]
    lines.insert(9, '{"event": "st')
    write_lines(tmp_path, lines)
    assert reference_losses(str(tmp_path)) == [(0.25, 1.0), (0.5, 1.0), (0.75, 1.0)]


def test_a_run_resumed_just_before_a_mark_is_not_judged_there():
    trainer = train_gpt.Trainer.__new__(train_gpt.Trainer)
    trainer.reference, trainer.begun, trainer.flying = [(0.25, 1.0), (0.5, 1.0)], None, []
    trainer.config = train_gpt.load_config(small_words("x", "x"), {}, gpus=0)
    trainer.step, trainer.recent, trainer.log = 5, [(0.24, 3.0)], Log(None, lambda: 0.0)
    trainer.meet_reference(0.24)
    trainer.meet_reference(0.26)
    trainer.recent += [(0.46, 0.9), (0.49, 0.9)]
    trainer.meet_reference(0.51)
    assert trainer.reference == [] and trainer.begun == 0.24


def test_a_kill_leaves_a_cut_line_and_the_chain_goes_on(tmp_path):
    """The next process goes on behind the last whole line, and what was cut counts for nothing."""
    log = Log(tmp_path, lambda: 0.0)
    log.event("began")
    log.event("step", step=1)
    log.close()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    log = Log(tmp_path, lambda: 0.0)
    log.event("began")
    log.event("step", step=2)
    log.close()
    found, chain, faults = receipt.read_chain(tmp_path / "events.jsonl")
    assert [event["event"] for event in found] == ["began", "step", "began", "step"]
    assert chain == log.chain and not faults


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "bad.pem").write_text("nothing")
    for words in ([str(tmp_path / "nowhere")], [str(folder), str(tmp_path / "bad.pem")], []):
        assert receipt.main(words) == 2
    said = capsys.readouterr().err
    assert "must be a run folder" in said and "must be a file with an Ed25519 key" in said and "Traceback" not in said


def test_mean_loss_looks_back_a_twentieth():
    losses = [(at / 100, float(at)) for at in range(100)]
    assert mean_loss(losses, 0.25) == 22 and mean_loss([], 0.5) != mean_loss([], 0.5)


def test_a_hopeless_run_ends_at_the_first_mark_and_can_go_on(mini, finished, tmp_path, capsys):
    """Beside a reference with a good rate one with none is stopped at 25 %, exit code 3, with its checkpoint; without
    the reference the same run goes on to its end. One that is as good is not stopped."""
    words = small_words(mini, tmp_path, **WORDS, ITERATIONS=24, STAGES="train")
    dull = [*words, "RUN_ID=dull", "MATRIX_LR=1e-6", "TIED_EMBED_LR=1e-6", "SCALAR_LR=1e-6"]
    assert main([*dull, f"REFERENCE_RUN={finished}"], {}) == 3
    said = capsys.readouterr().err
    assert "at 25% of training the loss is" in said and "REFERENCE_MARGIN=0.02" in said
    assert max(event["step"] for event in events(tmp_path / "dull", "step")) == 6
    assert main(dull, {}) == 0
    assert max(event["step"] for event in events(tmp_path / "dull", "step")) == 24
    assert main([*words, "RUN_ID=same", f"REFERENCE_RUN={finished}"], {}) == 0
    assert "at 75% train_loss:" in (tmp_path / "same" / "train.log").read_text()
    assert main([*words, "RUN_ID=none", f"REFERENCE_RUN={tmp_path}"], {}) == 2
    (tmp_path / "events.jsonl").write_text("")
    assert main([*words, "RUN_ID=none", f"REFERENCE_RUN={tmp_path}"], {}) == 2
    assert "has no steps around 25%, 50%, 75%" in capsys.readouterr().err
    assert len(reference_losses(str(finished))) == 3
