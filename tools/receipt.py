"""The receipt of a run: what its chained event log, settings, script, data and artifact come to, signed on request.

    python tools/receipt.py RUN_FOLDER [KEY_FILE]     writes receipt.json; with a key file (made where there is none)
                                                      it is signed with Ed25519
    python tools/receipt.py --check RUN_FOLDER        says what in the folder does not fit together; exit code 3 then
    python tools/receipt.py --key KEY_FILE            makes the key where there is none, and looks whether it can sign

Every line of events.jsonl ends with the hash of itself and of the chain before it, so a line that is edited, dropped or
moved breaks the chain there. Its events say with which settings, script and data the run began and what its result.json
and artifact.bin are. Who holds everything can make a whole new chain; a signature says whose chain it is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt as gpt  # noqa: E402

BEGAN = ("config_hash", "code_sha256", "source_sha256", "commit", "manifest_sha256", "seed")  # of the event `began`


class ReceiptError(Exception):
    """A user's mistake; the message is one clear line."""


class PackageError(ReceiptError):
    """A signature that cannot be looked at without a package."""


def read_chain(path: Path) -> tuple[list[dict[str, Any]], str, list[str]]:
    """The events of a log, the chain behind the last one, and the faults: lines whose chain does not follow. A line
    that is no JSON is what a kill cut short; it is none where the next event says that a process began."""
    events, chain, faults, cut = [], "", [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        found = gpt.CHAIN.search(line)
        if found is None:
            try:
                json.loads(line)
                faults.append(f"line {number}: has no chain")
            except ValueError:
                cut = number
            continue
        body = line[:found.start()] + "}"
        wanted, chain = gpt.link(chain, body), found[1]
        if chain != wanted:
            faults.append(f"line {number}: its chain does not follow from the lines before it")
        try:
            event = json.loads(body)
            name = event["event"]
        except (ValueError, KeyError, TypeError):
            faults.append(f"line {number}: is no event")
            continue
        if cut and name != "began":
            faults.append(f"line {cut}: is cut short, but no process began behind it")
        cut = 0
        events.append(event)
    return events, chain, faults


def facts(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What the receipt of a run folder holds, without a signature, and what does not fit together; ReceiptError where
    there is nothing to read."""
    try:
        events, chain, faults = read_chain(folder / "events.jsonl")
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise ValueError("result.json is no object")
    except (OSError, ValueError) as error:
        raise ReceiptError(f"{folder}: must be a run folder with events.jsonl and result.json ({error})") from None
    # A training that starts anew leaves what other settings had begun in the same folder, and kept nothing of.
    starts = [place for place, event in enumerate(events) if event["event"] == "start"]
    places = [place for place, event in enumerate(events) if event["event"] == "began"]
    began = [events[place] for place in places if not starts or place >= max(
        (other for other in places if other < starts[-1]), default=0)]
    ended = [event for event in events if event["event"] == "result"]
    if not began or not ended:
        return {}, [*faults, "events.jsonl: says nothing of a beginning or of a result"]
    last = {name: began[-1].get(name) for name in BEGAN}
    for name in ("config_hash", "code_sha256", "manifest_sha256", "seed"):
        if len({json.dumps(event.get(name)) for event in began}) > 1:
            faults.append(f"events.jsonl: its processes began with different {name}")
    said = {**{name: result.get(name) for name in BEGAN if name != "manifest_sha256"},
            "manifest_sha256": result.get("data", {}).get("manifest_sha256")}
    faults += [f"result.json: {name} is {said[name]}, the run began with {last[name]}" for name in BEGAN
               if said[name] != last[name]]
    if ended[-1].get("result_sha256") != gpt.result_digest(result):
        faults.append("result.json: is not the one that the run wrote")
    artifact = ended[-1].get("artifact_sha256")
    if (folder / "artifact.bin").exists() and gpt.sha256_file(folder / "artifact.bin") != artifact:
        faults.append("artifact.bin: is not the one that the run wrote")
    if (folder / "train_gpt.py").exists() and gpt.sha256_file(folder / "train_gpt.py") != last["code_sha256"]:
        faults.append("train_gpt.py: is not the one that ran")
    return {**last, "artifact_sha256": artifact, "result_sha256": ended[-1].get("result_sha256"), "events": len(events),
            "chain": chain}, faults


def read_key(path: Path) -> Any:
    """The Ed25519 key in a file; one is made, readable by its owner only, where the file is not there."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise ReceiptError(f"SIGN_KEY={path}: needs the package cryptography") from None
    try:
        if not path.exists():
            made = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(made)
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ReceiptError(f"SIGN_KEY={path}: must be a file with an Ed25519 key in PEM ({error})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ReceiptError(f"SIGN_KEY={path}: must be an Ed25519 key")
    return key


def signed_bytes(receipt: dict[str, Any]) -> bytes:
    """What is signed: everything but the signature."""
    return json.dumps({name: value for name, value in receipt.items() if name != "signature"}, sort_keys=True).encode()


def sign(receipt: dict[str, Any], path: Path) -> dict[str, Any]:
    """The receipt with public key and signature."""
    key = read_key(path)
    receipt = {**receipt, "public_key": key.public_key().public_bytes_raw().hex()}
    return {**receipt, "signature": key.sign(signed_bytes(receipt)).hex()}


def signer(folder: Path) -> str:
    """The public key of a folder's receipt, empty where it has none or is not signed."""
    try:
        receipt = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
        return str(receipt["public_key"]) if "signature" in receipt else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check(folder: Path) -> list[str]:
    """What in a run folder does not fit together, its receipt and the signature included; [] where all does."""
    found, faults = facts(folder)
    path = folder / "receipt.json"
    if not path.exists():
        return faults
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        faults += [f"receipt.json: {name} is {receipt.get(name)}, the folder says {value}"
                   for name, value in found.items() if receipt.get(name) != value]
        if "signature" in receipt:
            faults += check_signature(receipt)
    except PackageError:
        if not faults:
            raise
    except (OSError, ValueError, AttributeError) as error:
        faults.append(f"receipt.json: cannot be read ({error})")
    return faults


def check_signature(receipt: dict[str, Any]) -> list[str]:
    """[] where the signature is that of the receipt's public key."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise PackageError("receipt.json: is signed, and to look at that needs the package cryptography") from None
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(receipt["public_key"]))
        key.verify(bytes.fromhex(receipt["signature"]), signed_bytes(receipt))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return ["receipt.json: its signature is not that of its public key"]
    return []


def main(argv: list[str]) -> int:
    """Returns 0, 2 for a mistake of the user, 3 where something does not fit together."""
    words = [word for word in argv if word not in ("--check", "--key")]
    if not 1 <= len(words) <= 2 - (len(words) != len(argv)):
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(words[0])
    try:
        if "--key" in argv:
            read_key(folder)
            return 0
        if "--check" in argv:
            faults, by = check(folder), signer(folder)
            print("\n".join(faults) if faults else f"{folder}: events, result, script and artifact fit together; "
                  + (f"signed by {by}" if by else "not signed"))
            return 3 if faults else 0
        receipt, faults = facts(folder)
        if len(words) == 1 and (by := signer(folder)):
            faults.append(f"receipt.json: was signed by {by}, and no SIGN_KEY signs it again; it stays as it was")
        if faults:
            print("\n".join(faults), file=sys.stderr)
            return 3
        receipt = sign(receipt, Path(words[1])) if len(words) > 1 else receipt
        gpt.write_json(folder / "receipt.json", receipt)
    except ReceiptError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
