from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from distrib_launcher.redaction import Redactor, names_secret
from hypothesis import given, strategies as st

LAUNCHER = Path(__file__).parents[2] / "launcher"
HF = "hf_" + "aB3dE6gH9" * 4
# any character but those of a mark and of line ends; no value of letters or digits alone, which may be a word
LETTER = st.characters(codec="utf-8", exclude_characters="<>", exclude_categories=["Cs", "Zl", "Zp", "Cc"])
VALUE = st.text(st.sampled_from("'\"\\ $%/\u00e9") | LETTER, min_size=8).map(lambda text: f"x{text.strip()}7")
PLAIN = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz ,.\n"))


def nothing_exists(path: str) -> bool:
    return False


def as_shell_word(value: str) -> str:
    return shlex.quote(f"--key={value}")


def as_json_in_a_shell_word(value: str) -> str:
    return shlex.quote(json.dumps({"key": value}))


@pytest.mark.parametrize(
    "written",
    [str, json.dumps, repr, as_shell_word, as_json_in_a_shell_word, lambda value: quote(value, safe="")],
)
@given(value=VALUE, before=PLAIN, after=PLAIN)
def test_a_secret_is_found_wherever_and_however_it_is_written(
    written: Callable[[str], str], value: str, before: str, after: str
) -> None:
    text = before + written(value) + after
    shown = Redactor({"HUB_TOKEN": value}, exists=nothing_exists).text(text)

    assert value not in shown
    assert "<redacted: HUB_TOKEN>" in shown
    assert shown.startswith(before)
    assert shown.endswith(after)


@given(values=st.lists(VALUE, max_size=4), text=PLAIN)
def test_what_is_redacted_stays_as_it_is_when_redacted_again(values: list[str], text: str) -> None:
    redactor = Redactor({f"S{i}_TOKEN": value for i, value in enumerate(values)}, exists=nothing_exists)
    once = redactor.text(text.join(["", *values, ""]))

    assert redactor.text(once) == once


@given(value=st.text("abcdefghijklmnopqrstuvwxyz0123456789", max_size=7), text=PLAIN)
def test_a_short_value_garbles_no_text(value: str, text: str) -> None:
    assert Redactor({"HUB_TOKEN": value}).text(f"{text}{value}{text}") == f"{text}{value}{text}"


@given(words=st.lists(st.one_of(PLAIN, VALUE, st.just("--token"), st.just("--token=a-secret-1"))))
def test_a_command_line_keeps_its_number_of_words(words: list[str]) -> None:
    shown = Redactor({}).words(words)

    assert len(shown) == len(words)
    assert not any("a-secret-1" in word for word in shown)


@given(env=st.dictionaries(st.sampled_from(["HF_TOKEN", "DB_PASSWORD", "COPY"]), VALUE))
def test_an_environment_keeps_its_names(env: dict[str, str]) -> None:
    shown = Redactor(env, exists=nothing_exists).mapping(env)

    assert list(shown) == list(env)
    assert all(shown[name] == f"<redacted: {name}>" for name in env if name != "COPY")


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN_2", "hf-token", "hubToken", "use_auth_token",
        "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "apiKey", "wandb.api_key",
        "PGPASSWORD", "DB_PASSWORD_PROD", "MYSQL_PWD", "SMTP_PASS", "GH_PAT", "SSHPASS", "passphrase",
        "CLIENT_SECRET", "VAULT_SECRET_ID", "SECRET_KEY_BASE", "SSH_PRIVATE_KEY", "GCP_CREDENTIALS", "ssh-key",
        "SLACK_WEBHOOK_URL", "AZURE_STORAGE_CONNECTION_STRING", "MLFLOW_TRACKING_PASSWORD", "COMET_API_KEY",
    ],
)  # fmt: skip
def test_a_name_that_says_so_holds_a_secret_whatever_the_value(name: str) -> None:
    assert names_secret(name, "word")


@pytest.mark.parametrize(
    "name",
    [
        "KEYBOARD", "KEYMAP", "MONKEY", "TOKENIZERS_PARALLELISM", "TOKENIZER", "tokenizer-name", "SSH_AUTH_SOCK",
        "PWD", "OLDPWD", "HOME", "PATH", "MAX_TOKENS", "max-new-tokens", "eos_token", "pad-token", "pad_token_id",
        "token-dropout", "num-pass", "BYPASS", "COMPASS", "HF_TOKEN_PATH", "SSH_KEY_PATH", "TOKEN_FILE", "PATTERN",
        "AWS_ACCESS_KEY_ID", "SSH_PUBLIC_KEY", "sort-key", "image_key", "hub-private-repo", "private", "key",
        "SECRET_NAME", "OAUTH_TOKEN_URL", "XAUTHORITY", "AUTHOR", "secretary",
    ],
)  # fmt: skip
def test_a_false_friend_holds_none(name: str) -> None:
    assert not names_secret(name, "a-plain-value")


@pytest.mark.parametrize(
    ("value", "secret"),
    [
        ("A035C8C19219BA821ECEA86B64E628F8D684696D", True),
        ("jpg", False),
        ("resnet50-imagenet-2012-v2", False),
    ],
)
def test_the_value_decides_where_the_name_may_mean_something_else(value: str, secret: bool) -> None:
    assert names_secret("DATA_KEY", value) is secret


@pytest.mark.parametrize("value", ["true", "1", "", "postgres", "12345678", "None", "changeme"])
def test_an_ordinary_word_garbles_no_text(value: str) -> None:
    text = f"postgres: true after 12345678 s, None left; changeme {value}"

    assert Redactor({"DB_PASSWORD": value}).text(text) == text


def test_a_plain_word_is_hidden_where_its_name_stands_beside_it() -> None:
    redactor = Redactor({})

    assert redactor.mapping({"DB_PASSWORD": "postgres"}) == {"DB_PASSWORD": "<redacted: DB_PASSWORD>"}
    assert redactor.words(["--password", "postgres"]) == ["--password", "<redacted: password>"]


def test_a_path_that_exists_is_no_secret(tmp_path: Path) -> None:
    key = tmp_path / "service-account-1.json"
    key.write_text("{}")
    env = {
        "GCP_CREDENTIALS": str(key),
        "AUTH_TOKEN": str(tmp_path),
        "OLD_TOKEN": "/K7MDENG/bPxRfiCYEXAMPLEKEY",
    }
    redactor = Redactor(env)

    assert redactor.text(f"in {tmp_path}: {key} /K7MDENG/bPxRfiCYEXAMPLEKEY") == (
        f"in {tmp_path}: {key} <redacted: OLD_TOKEN>"
    )
    assert redactor.mapping(env) == {**env, "OLD_TOKEN": "<redacted: OLD_TOKEN>"}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("--hf-token X --lr 1", "--hf-token <redacted: hf-token> --lr 1"),
        ("--api_key=X", "--api_key=<redacted: api_key>"),
        ("-password X", "-password <redacted: password>"),
        ("+wandb.api_key=X lr=1", "+wandb.api_key=<redacted: wandb.api_key> lr=1"),
        ("env HF_TOKEN=X ./run.sh", "env HF_TOKEN=<redacted: HF_TOKEN> ./run.sh"),
        ("--set tracking.apiKey=X", "--set tracking.apiKey=<redacted: tracking.apiKey>"),
        ("--use-auth-token --lr 1", "--use-auth-token --lr 1"),
        ("--use-auth-token -n 1", "--use-auth-token -n 1"),
        ("--use-auth-token True --lr 1", "--use-auth-token True --lr 1"),
        ("--token -1abcdefg", "--token <redacted: token>"),
        ("--token", "--token"),
        ("--api-key=", "--api-key="),
        ("--password A B", "--password <redacted: password> B"),
        ("--tokenizer gpt2 --key jpg", "--tokenizer gpt2 --key jpg"),
        ("--eos-token </s> --max-tokens 100", "--eos-token </s> --max-tokens 100"),
        ("--url https://me:X@host/x", "--url https://me:<redacted: password>@host/x"),
    ],
)
def test_words_of_a_command_line(words: str, shown: str) -> None:
    assert shlex.join(Redactor({}).words(words.split())).replace("'", "") == shown


def test_what_a_flag_was_given_is_hidden_in_later_texts_too() -> None:
    redactor = Redactor({}, ["train.py", "--api-key", "not-in-env-1", "--password=word"])

    assert redactor.text("401 for key 'not-in-env-1': word") == "401 for key '<redacted: api-key>': word"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://me:hunter2@db/x", "postgres://me:<redacted: password>@db/x"),
        ("redis://:p@ss@host:6379", "redis://:<redacted: password>@host:6379"),
        ("git clone https://0123456789abcdef01@example.com/x", "git clone https://<redacted: user>@example.com/x"),
        ("ssh://git@github.com/x http://h:80/a@b http://[::1]:80", "ssh://git@github.com/x http://h:80/a@b http://[::1]:80"),
        (f"login({HF!r})", "login('<redacted: a Hugging Face token>')"),
        ("ghp_" + "a1B2" * 9, "<redacted: a GitHub token>"),
        ("key=sk-proj-" + "a1B2" * 9, "key=<redacted: an API key>"),
        ("AKIAIOSFODNN7EXAMPLE", "<redacted: an AWS key id>"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer <redacted: a bearer token>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----\nx", "<redacted: a private key>\nx"),
        ("hf_transfer sk-learn-contrib-image-segmentation-tools disk-based AKIA the bearer of bad news",) * 2,
        ("commit 2eb2bb2f6c0b4e0c9d2a8f7b1c3d5e6f7a8b9c0d",) * 2,
    ],
)  # fmt: skip
def test_urls_and_well_known_shapes(text: str, shown: str) -> None:
    assert Redactor({}).text(text) == shown


def test_the_password_of_a_url_in_the_environment_is_hidden_by_itself() -> None:
    redactor = Redactor({"DATABASE_URL": "postgres://me:hunter2hunter2@db/x"})

    assert redactor.text("login failed: hunter2hunter2") == "login failed: <redacted: DATABASE_URL>"


def test_a_value_that_is_part_of_what_stands_for_it_is_left() -> None:
    assert Redactor({"HUB_API_TOKEN": "HUB_API_TOKEN"}).text("set HUB_API_TOKEN") == "set HUB_API_TOKEN"


def test_each_line_of_a_key_is_hidden() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSjAgEAAoIB\n-----END KEY-----"

    assert Redactor({"DEPLOY_KEY": key}).text("| AQEFAASCBKcwggSjAgEAAoIB") == "| <redacted: DEPLOY_KEY>"


def test_the_longer_of_two_secrets_is_replaced_whole() -> None:
    redactor = Redactor({"A_TOKEN": "abcd1234", "B_TOKEN": "abcd1234-efgh"})

    assert redactor.text("abcd1234-efgh abcd1234") == "<redacted: B_TOKEN> <redacted: A_TOKEN>"


def test_a_program_still_gets_the_standard_library_s_module_of_this_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import secrets\nprint(secrets.__file__)\n")
    command = [sys.executable, "-m", "distrib_launcher", "launch", "-n", "1", "--cpu", "train.py"]
    path = f"{LAUNCHER}:{LAUNCHER.parent}"
    ended = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )

    assert ended.returncode == 0, ended.stderr
    assert "distrib_launcher" not in ended.stdout
