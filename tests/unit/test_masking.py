"""Credentials are masked, whatever else they look like stays readable."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tasks.masking import (
    MASK,
    add_secret_names,
    flatten_hyperparameters,
    hidden_values,
    is_secret_name,
    mask_hyperparameters,
    mask_text,
    mask_url,
    mask_values,
)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("/plain/path@2", "/plain/path@2"),
        ("s3://bucket/key@2", "s3://bucket/key@2"),
        ("https://me:pass@host:1/x", f"https://{MASK}@host:1/x"),
        ("https://me:p@ss@host/x", f"https://{MASK}@host/x"),
        ("https://token@host", f"https://{MASK}@host"),
        ("cache::s3://a:b@bucket/x", f"cache::s3://{MASK}@bucket/x"),
        ("https://h/x?sig=abc&v=1", f"https://h/x?sig={MASK}&v=1"),
        ("https://h/x?a=1&api_key=k#f", f"https://h/x?a=1&api_key={MASK}#f"),
        ("https://h/x?X-Amz-Signature=k&v=1", f"https://h/x?X-Amz-Signature={MASK}&v=1"),
        ("https://h/x?AWSAccessKeyId=k", f"https://h/x?AWSAccessKeyId={MASK}"),
        ("https://h/x?api%5Fkey=k", f"https://h/x?api%5Fkey={MASK}"),
        ("https://h/#access_token=k", f"https://h/#access_token={MASK}"),
        ("postgresql://me:pa/s?s@h:5/db", f"postgresql://{MASK}@h:5/db"),
        ("https://h:8080/x@2", "https://h:8080/x@2"),
        ("https://[::1]:80/x@2", "https://[::1]:80/x@2"),
    ],
)
def test_urls_lose_userinfo_and_secret_query_values_only(url: str, masked: str) -> None:
    """Userinfo and secret-named query values are replaced; the rest of the URL stays."""
    assert mask_url(url) == masked


@given(
    st.text(st.characters(codec="ascii", exclude_characters="/?#"), min_size=8),
    st.sampled_from(["s3", "https", "sqlite+x"]),
)
def test_no_password_survives_masking(password: str, scheme: str) -> None:
    """Whatever characters a password has, the masked URL does not contain it."""
    assert mask_url(f"{scheme}://user:{password}@host/x") == f"{scheme}://{MASK}@host/x"


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "API_KEY",
        "dbPassword",
        "hf_token",
        "token",
        "aws.secret",
        "PWD",
        "access-key",
        "credentials",
        "api_keys",
        "Authorization",
        "connection_string",
        "db.pwd.old",
    ],
)
def test_names_of_credentials_are_recognised(name: str) -> None:
    """Names of credentials are recognised in snake, camel, dotted and capital spelling."""
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("lr", "max_tokens", "tokenizer", "pad_token", "num_keys", "key_dim", "author"),
        *("secretary", "api.key_dim", "authors"),
    ],
)
def test_ordinary_hyperparameters_are_not_masked(name: str) -> None:
    """Names that only resemble a credential's are left alone."""
    assert not is_secret_name(name)


def test_secrets_are_masked_at_any_depth() -> None:
    """Nested mappings and lists are searched; None and booleans stay visible."""
    masked = mask_hyperparameters(
        {
            "lr": 0.1,
            "hub": {"token": "x", "url": "https://a:b@h"},
            "sources": [{"password": "p"}, "s3://k:s@b"],
            "secret": None,
            "use_token": True,
        }
    )
    assert masked == {
        "lr": 0.1,
        "hub": {"token": MASK, "url": f"https://{MASK}@h"},
        "sources": [{"password": MASK}, f"s3://{MASK}@b"],
        "secret": None,
        "use_token": True,
    }


def test_names_of_ones_own_are_added() -> None:
    """By patterns, in any case, for nested values by their whole names too, and in URLs."""
    assert not is_secret_name("plate_no")
    add_secret_names(["plate_no", "*_dsnx", "shop.pl*"])
    assert mask_hyperparameters({"a": {"Plate_No": "x"}, "my_dsnx": 1, "shop": {"place": [2]}}) == {
        "a": {"Plate_No": MASK},
        "my_dsnx": MASK,
        "shop": {"place": MASK},
    }
    assert mask_hyperparameters({"place": [2], "plate_no_2": 3}) == {"place": [2], "plate_no_2": 3}
    assert mask_text("at https://h/?plate_no=x") == f"at https://h/?plate_no={MASK}"


def test_hidden_values_are_masked_in_all_text() -> None:
    """While the block lasts; the longest first, and no short ones."""
    secrets = {
        "password": "hunter2",
        "tokens": {"hf_token": ["hunter2-more"]},
        "pwd": "a",
        "n": "n",
    }
    with hidden_values(secrets), hidden_values({"password": "hunter2"}):
        assert mask_text("a hunter2-more, n: hunter2!") == f"a {MASK}, n: {MASK}!"
        assert mask_values("s3://u:p@b hunter2") == f"s3://u:p@b {MASK}"
    assert mask_text("hunter2") == "hunter2"


def test_text_has_every_url_masked() -> None:
    """Each URL inside a sentence is masked on its own."""
    text = "from https://a:b@h/x to s3://c:d@e, done"
    assert mask_text(text) == f"from https://{MASK}@h/x to s3://{MASK}@e, done"


def test_flattening_joins_names_and_keeps_scalars() -> None:
    """Nested names are joined by dots, lists become JSON, and values keep their types."""
    flat = flatten_hyperparameters(
        {"optimizer": {"lr": 1e-3, "betas": (0.9, 0.999)}, "name": "cnn", "seed": 7, "note": {}}
    )
    assert flat == {
        "optimizer.lr": 1e-3,
        "optimizer.betas": "[0.9,0.999]",
        "name": "cnn",
        "seed": 7,
        "note": "{}",
    }


def test_flattening_says_how_much_it_cut() -> None:
    """A long value keeps its beginning and tells how many characters are missing."""
    value = flatten_hyperparameters({"prompt": "x" * 700})["prompt"]
    assert value == "x" * 500 + "... [200 more characters]"


def test_flattening_masks() -> None:
    """A secret does not survive flattening, at any depth."""
    assert "hunter2" not in str(flatten_hyperparameters({"db": {"password": "hunter2"}}))
    assert "hunter2" not in str(flatten_hyperparameters({"dbs": [{"password": "hunter2"}]}))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), _VALUES))
def test_any_hyperparameters_become_a_record(values: dict[str, object]) -> None:
    """Whatever is passed, the result survives JSON unchanged."""
    flat = flatten_hyperparameters(values)
    assert json.loads(msgspec.json.encode(flat)) == flat
