"""Where an adapter comes from: the record and the card of a training run, and pushing both to the Hub."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants, errors
from huggingface_hub.utils._http import default_client_factory

from perft.adapter import read_adapter
from perft.cli import main
from perft.config import PerftConfig
from perft.errors import AdapterError, PerftError
from perft.hub import push_adapter
from perft.provenance import describe_base, hub_id, metrics_of, model_card, read_record
from perft.recipe import TrainConfig
from perft.report import describe_adapter
from perft.train import train

# the HTTP library that huggingface_hub has, whose name changes with its version
httpx: Any = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
COMMIT = {"commitUrl": "https://huggingface.co/acme/sql/commit/c0ffee", "commitOid": "c0ffee"}


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Path:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "hello", "completion": " world"}\n' * 8)
    config = TrainConfig(
        model=str(tiny_base),
        data=(str(data),),
        output=str(tmp_path / "out"),
        max_steps=2,
        batch_size=4,
        log_steps=1,
        eval_split=2,
        eval_steps=1,
    )
    train(config, PerftConfig(num_experts=3, top_k=2, r=2))
    return tmp_path / "out"


def test_a_trained_adapter_says_where_it_comes_from(trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    record = read_record(trained)
    assert record is not None
    data = tmp_path / "train.jsonl"
    assert record["data_sha256"] == {str(data): hashlib.sha256(data.read_bytes()).hexdigest()}
    assert record["base"] == describe_base(str(tiny_base))
    assert record["outcome"]["digest"] == read_adapter(trained).digest
    log = [json.loads(line) for line in (trained / "training_log.jsonl").read_text().splitlines()]
    evaluations = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    metrics = record["outcome"]["metrics"]
    assert metrics["eval_loss"] == evaluations[-1]
    assert metrics["best_eval_loss"] == min(evaluations)
    assert metrics["loss"] == [entry["loss"] for entry in log if "loss" in entry][-1]
    assert {"python", "torch", "transformers", "peft", "perft-serve"} <= record["versions"].keys()


def test_the_digest_of_a_base_is_that_of_its_files(tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    digest = describe_base(str(tiny_base))["digest"]
    assert describe_base(str(copy))["digest"] == digest
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert describe_base(str(copy))["digest"] != digest
    (copy / "model.safetensors").unlink()
    assert describe_base(str(copy))["digest"] is None


def test_a_base_in_the_hubs_cache_is_not_read_again(tiny_base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--acme--base" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--acme--base" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny_base.iterdir():
        content = file.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(b"" if file.suffix == ".safetensors" else content)  # its name is believed
        (snapshot / file.name).symlink_to(blob)
    found = describe_base(str(snapshot))
    assert (found["digest"], found["revision"]) == (describe_base(str(tiny_base))["digest"], "a" * 40)


def test_inspect_shows_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] == read_record(trained)
    assert main(["inspect", str(trained)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("trained on", "2 steps", "best_eval_loss", "transformers"):
        assert words in shown
    (trained / "perft_training.json").unlink()
    assert describe_adapter(trained).training is None
    (trained / "perft_training.json").write_text("[]")
    with pytest.raises(AdapterError, match="not the record of a training run"):
        describe_adapter(trained)


def test_the_card_has_peft_s_front_matter(trained: Path) -> None:
    text = (trained / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "peft"
    assert matter["pipeline_tag"] == "text-generation"
    assert "perft" in matter["tags"]
    assert "base_model" not in matter, "a local folder is no model of the Hub"
    assert str(trained.parent) not in text
    assert "PERFT-R (Routed)" in body
    record = read_record(trained)
    assert record is not None
    record["recipe"]["model"] = "allenai/OLMoE-1B-7B-0924"
    matter = yaml.safe_load(model_card(read_adapter(trained), record).split("---\n")[1])
    assert matter["base_model"] == "allenai/OLMoE-1B-7B-0924"
    assert "base_model:adapter:allenai/OLMoE-1B-7B-0924" in matter["tags"]


def test_names_of_the_hub(tmp_path: Path) -> None:
    assert hub_id("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"
    for base in (None, "", str(tmp_path), "/no/such/folder", "no/such/folder", "../models"):
        assert hub_id(base) is None


def test_metrics_are_the_last_and_the_best() -> None:
    history = [{"loss": 3.0, "step": 1}, {"eval_loss": 1.0, "step": 1}, {"loss": 2.0}, {"eval_loss": 1.5}]
    assert metrics_of(history) == {"loss": 2.0, "eval_loss": 1.5, "best_eval_loss": 1.0}


class FakeHub:
    """The Hub as far as a push needs it, behind huggingface_hub's own HTTP client."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.refuse: Any = None

    def __call__(self, request: Any) -> Any:
        request.read()
        self.requests.append(request)
        if isinstance(self.refuse, Exception):
            raise self.refuse
        if self.refuse is not None:
            return httpx.Response(self.refuse.status_code, json=self.refuse.json(), request=request)
        path = request.url.path
        if path == "/api/repos/create":
            return httpx.Response(200, json={"url": "https://huggingface.co/acme/sql"})
        if "/preupload/" in path:
            files = json.loads(request.content)["files"]
            return httpx.Response(
                200,
                json={
                    "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                },
            )
        if "/commit/" in path:
            return httpx.Response(200, json=COMMIT)
        return httpx.Response(200, json={})

    def body(self, part: str) -> Any:
        """The JSON body of the one request whose path holds `part`."""
        (request,) = [request for request in self.requests if part in request.url.path]
        return json.loads(request.content)

    def commit(self) -> tuple[str, dict[str, Any], list[str]]:
        """Path, header and file names of the one commit."""
        (request,) = [request for request in self.requests if "/commit/" in request.url.path]
        lines = [json.loads(line) for line in request.content.splitlines()]
        return request.url.path, lines[0]["value"], [line["value"]["path"] for line in lines[1:]]


def is_private(created: dict[str, Any]) -> bool:
    """Whether a body asks for a private repository, in the words of either version of the client."""
    assert {"private", "visibility"} & created.keys(), "the Hub's own default may be public"
    return created.get("private") is True or created.get("visibility") == "private"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(fake)))
    yield fake
    huggingface_hub.set_client_factory(default_client_factory)


@pytest.fixture
def adapter(tiny_adapters: dict[str, str], tmp_path: Path) -> Path:
    """An adapter's folder with a training run's files, and some that are nobody's business."""
    folder = tmp_path / "sql"
    folder.mkdir()
    for file in Path(tiny_adapters["routed"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("README.md", "perft_training.json", "notes.txt"):
        (folder / name).write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_text("")
    return folder


def test_a_push_is_one_commit_of_the_adapters_files(
    hub: FakeHub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(adapter), "acme/sql"]) == 0
    assert capsys.readouterr().out.strip() == COMMIT["commitUrl"]
    created = hub.body("/api/repos/create")
    assert (created["name"], created["organization"]) == ("sql", "acme")
    assert is_private(created)
    path, header, files = hub.commit()
    assert path == "/api/models/acme/sql/commit/main"
    assert header["summary"] == f"PERFT-R adapter {read_adapter(adapter).digest[:12]}"
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md", "perft_training.json"}


def test_what_a_push_can_be_told(hub: FakeHub, adapter: Path) -> None:
    arguments = ["push", str(adapter), "acme/sql", "--public", "--revision", "v2", "--message", "Second try"]
    assert main(arguments) == 0
    assert not is_private(hub.body("/api/repos/create"))
    assert any(request.url.path == "/api/models/acme/sql/branch/v2" for request in hub.requests)
    path, header, _ = hub.commit()
    assert (path, header["summary"]) == ("/api/models/acme/sql/commit/v2", "Second try")


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (httpx.Response(401, json={"error": "Unauthorized"}), r"no valid token \(401\)"),
        (httpx.Response(403, json={"error": "Forbidden"}), r"may not write to acme/sql \(403\)"),
        (httpx.Response(400, json={"error": "Name is taken"}), r"refuses acme/sql \(400\): .*Name is taken"),
        (httpx.ConnectError("no route"), r"cannot be reached \(ConnectError: no route\); nothing was pushed"),
    ],
)
def test_what_the_hub_refuses_is_said(refuse: Any, message: str, hub: FakeHub, adapter: Path) -> None:
    hub.refuse = refuse
    with pytest.raises(PerftError, match=message):
        push_adapter(adapter, "acme/sql")


def test_offline_is_said(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PerftError, match="HF_HUB_OFFLINE is set"):
        push_adapter(adapter, "acme/sql")


@pytest.mark.parametrize("spoil", ["weights", "name"])
def test_nothing_is_sent_of_what_cannot_be_pushed(spoil: str, hub: FakeHub, adapter: Path) -> None:
    if spoil == "weights":
        (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    name, message = {
        "weights": ("acme/sql", "not a whole safetensors file"),
        "name": ("a/b/c", "cannot be the name"),
    }[spoil]
    with pytest.raises(PerftError, match=message):
        push_adapter(adapter, name)
    assert hub.requests == []
