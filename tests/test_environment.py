"""What a manifest says of the world around it: versions and the commit, and no secrets."""

import argparse
import dataclasses
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from forgather_ckpt import environment, strict_json
from forgather_ckpt.environment import REDACTED, redact
from tests.states import plain_values

FAKE_HUB_TOKEN = "hf_" + "a1" * 17


def test_versions_are_those_that_run():
    facts = environment.describe()
    assert facts["torch"] == metadata.version("torch")
    assert facts["numpy"] == np.__version__
    assert facts["python"].count(".") == 2
    strict_json.dumps(facts)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "some/branch")
    git("commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    return git


def test_the_commit_is_the_one_that_is_checked_out(repository):
    first = repository("rev-parse", "HEAD")
    assert environment.describe()["commit"] == first
    repository("commit", "-q", "--allow-empty", "-m", "second")
    repository("pack-refs", "--all")
    assert environment.describe()["commit"] == repository("rev-parse", "HEAD") != first
    repository("checkout", "-q", "--detach", first)
    assert environment.describe()["commit"] == first


def test_a_branch_without_a_commit_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    assert environment._commit(tmp_path) is None


def test_without_a_repository_there_is_no_commit(monkeypatch):
    monkeypatch.chdir("/")
    assert "commit" not in environment.describe()


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({"learning_rate": 1e-3, "steps": 5, "none": None}, {"learning_rate": 1e-3, "steps": 5, "none": None}),
        ({"hub_token": "abc", "API_KEY": "abc"}, {"hub_token": REDACTED, "API_KEY": REDACTED}),
        ({"password": "x", "aws_secret_access_key": b"x"}, {"password": REDACTED, "aws_secret_access_key": REDACTED}),
        ({"wandb": {"api_key": "abc", "project": "p"}}, {"wandb": {"api_key": REDACTED, "project": "p"}}),
        ({"tokens": ["abc"], "token": ["abc", "def"]}, {"tokens": ["abc"], "token": [REDACTED, REDACTED]}),
        ({"num_input_tokens": 5, "token": 7}, {"num_input_tokens": 5, "token": 7}),
        ({"hub_token": None, "read_token": ""}, {"hub_token": None, "read_token": ""}),
        (f"run --hub {FAKE_HUB_TOKEN} now", f"run --hub {REDACTED} now"),
        ("key sk-" + "b" * 30, f"key {REDACTED}"),
        ("AKIA" + "B" * 16, REDACTED),
        ("ghp_" + "c" * 36, REDACTED),
        ("eyJ" + "d" * 12 + "." + "e" * 12 + "." + "f" * 4, REDACTED),
        ("https://user:pass@host/path", f"https{REDACTED}host/path"),
        ("https://host/path", "https://host/path"),
        ([("a", {1, 2}), Path("runs/a")], [["a", [1, 2]], "runs/a"]),
        ({1: "a", None: "b"}, {"1": "a", "None": "b"}),
        (float("nan"), {"$float": "nan"}),
        (2**70, {"$int": hex(2**70)}),
        (torch.bfloat16, {"$dtype": "bfloat16"}),
        (torch.device("cuda:0"), {"$device": "cuda:0"}),
        (np.float32(0.5), {"$npscalar": ["<f4", "AAAAPw=="]}),
        (print, "<builtins.builtin_function_or_method>"),
        (argparse.Namespace(password="x"), "<argparse.Namespace>"),
        ({"model": torch.nn.ReLU()}, {"model": "<torch.nn.modules.activation.ReLU>"}),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_arguments_are_shown_without_secrets(data, shown):
    assert redact(data) == shown
    strict_json.dumps(redact(data))


@given(plain_values)
def test_any_arguments_become_plain_json(value):
    strict_json.dumps(redact(value))


def test_arguments_of_a_dataclass_are_what_its_dict_says():
    @dataclasses.dataclass
    class Arguments:
        hub_token: str = FAKE_HUB_TOKEN
        note: str = f"token: {FAKE_HUB_TOKEN}"

    assert FAKE_HUB_TOKEN not in str(redact(dataclasses.asdict(Arguments())))
