"""Long prompts from short ones: an endpoint with every fault that there is, and the embedded model's own words."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastvid
from fastvid import env
from fastvid.benchmarks.quality.vocabulary import words
from fastvid.cli import commands
from fastvid.requests import prompts
from fastvid.requests.request import Request

KEY = "sk-a-secret-key"
CAPTION = "A red fox runs through deep snow, seen from the side, in blue morning light."
Handler = http.server.BaseHTTPRequestHandler
LONG = 5 * prompts.MAX_ANSWER


@contextmanager
def endpoint(reply: Callable[[Handler], None]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, the requests that came) of a server that answers so."""
    asked: list[dict[str, Any]] = []

    class Answer(Handler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **json.loads(body)})
            with suppress(BrokenPipeError, ConnectionResetError):
                reply(self)

        def do_GET(self) -> None:
            asked.append({"path": self.path, "key": self.headers.get("Authorization")})
            send(self, chat(CAPTION))

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def chat(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def send(handler: Handler, body: bytes, code: int = 200, **headers: str) -> None:
    handler.send_response(code)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def replying(body: bytes, code: int = 200, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: send(handler, body, code, **headers)


def drip(handler: Handler) -> None:
    """A byte now and then, for ever: no single read is slow."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def sleep(handler: Handler) -> None:
    time.sleep(3)


def cut(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(chat(CAPTION)[:-5])


def expand(reply: Callable[[Handler], None], **options: Any) -> tuple[str, list[dict[str, Any]]]:
    with endpoint(reply) as (address, asked):
        return prompts.expand("a fox", endpoint=address, model="small", **{"key": KEY, **options}), asked


def test_what_is_asked_and_what_comes_back() -> None:
    caption, asked = expand(replying(chat(f"<think>a fox?</think>\n {CAPTION}\n")))
    assert caption == CAPTION and len(asked) == 1
    assert (asked[0]["path"], asked[0]["key"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert asked[0]["model"] == "small"
    assert [m["role"] for m in asked[0]["messages"]] == ["system", "user"]
    assert asked[0]["messages"][1]["content"] == "a fox"
    assert expand(replying(chat(CAPTION)), key=None)[1][0]["key"] is None


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint(replying(chat(CAPTION))) as (address, asked):
        for name, value in (("ENDPOINT", address + "/"), ("MODEL", "large"), ("KEY", KEY)):
            monkeypatch.setenv(f"FASTVID_PROMPT_{name}", value)
        assert prompts.expand("a fox") == CAPTION
    assert (asked[0]["model"], asked[0]["key"]) == ("large", f"Bearer {KEY}")
    assert env.unknown() == [] and KEY not in repr(env.read()) and KEY not in str(env.all_set())


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (replying(b"{}", 401), "401.*key is missing or wrong"),
        (replying(b"{}", 404), "404.*no model small"),
        (replying(b"{}", 429), "429"),
        (replying(KEY.encode(), 500), "500.*server failed"),
        (replying(b"<html>"), "not that of a chat endpoint"),
        (replying(b'{"choices": []}'), "not that of a chat endpoint"),
        (replying(b"[" * 100_000), "not that of a chat endpoint"),
        (replying(b"\xff\xfe"), "not that of a chat endpoint"),
        (replying(chat("  ")), "empty"),
        (replying(chat(None)), "empty"),
        (replying(chat("x" * 5000)), "5000 characters"),
        (replying(b" " * LONG), "longer than 1 MiB"),
        (cut, "not that of a chat"),
        (sleep, "within 0.5 s"),
        (drip, "within 0.5 s"),
    ],
)
def test_faults_are_told_in_time(reply: Callable[[Handler], None], says: str) -> None:
    start = time.monotonic()
    with pytest.raises(fastvid.PromptError, match=f"127.0.0.1.*{says}") as error:
        expand(reply, timeout=0.5)
    assert time.monotonic() - start < 1.5
    assert KEY not in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_goes_nowhere_else(code: int) -> None:
    with endpoint(replying(chat(CAPTION))) as (other, asked):
        with pytest.raises(fastvid.PromptError, match=f"redirects .HTTP {code}.") as error:
            expand(replying(b"", code, Location=f"{other}/chat/completions"))
        assert asked == [] and KEY not in str(error.value)


def test_nobody_there() -> None:
    with endpoint(sleep) as (address, _):
        pass
    with pytest.raises(fastvid.PromptError, match="cannot be reached"):
        prompts.expand("a fox", endpoint=address, model="small", key=KEY)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"endpoint": None}, "prompt_endpoint is missing"),
        ({"model": None}, "prompt_model is missing"),
        ({"endpoint": "localhost:8000"}, "must be an address"),
        ({"endpoint": "file:///etc/passwd"}, "must be an address"),
        ({"endpoint": "http://[::1"}, "must be an address"),
        ({"endpoint": "http://a/v1\r\nHost: b"}, "must be an address"),
        ({"endpoint": f"http://me:{KEY}@a/v1"}, "no user or password"),
        ({"key": f"{KEY}\r\nX: y"}, "printable"),
        ({"timeout": 0}, "timeout=0"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "MODEL", "KEY"):
        monkeypatch.delenv(f"FASTVID_PROMPT_{name}", raising=False)
    with pytest.raises(fastvid.InvalidRequest, match=says) as error:
        prompts.expand("a fox", **{"endpoint": "http://127.0.0.1:9/v1", "model": "small", **options})
    assert KEY not in str(error.value)


# ---------------------------------------------------------------- the embedded model's words


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("red ball bouncing up, dark", "a red circle moving up on a black background"),
        ("A BLACK box? no, a Golden box falls on beige", "a yellow square moving down on a beige background"),
        ("teal pyramid rotating at night", "a cyan triangle spinning on a black background"),
        ("a pink star shrinking on a navy background", "a pink star shrinking on a navy background"),
    ],
)
def test_free_prompts_become_its_sentence(prompt: str, sentence: str) -> None:
    assert prompts.expand_embedded(prompt) == sentence


@given(st.text(max_size=60))
def test_any_prompt_becomes_words_that_it_knows(prompt: str) -> None:
    try:
        made = prompts.expand_embedded(prompt)
    except fastvid.InvalidRequest:
        return  # NUL or half a surrogate pair
    assert set(made.split()) <= set(words()) and made == prompts.expand_embedded(prompt)
    assert prompts.expand_embedded(made) == made


def test_every_word_it_knows_is_kept() -> None:
    known = {"a", "on", "background", "moving", "standing"}
    for word in set(words()) - known:
        assert word in prompts.expand_embedded(word).split()
    choices = (prompts.COLOURS, prompts.SHAPES, prompts.MOTIONS, prompts.BACKGROUNDS)
    for choice in choices:
        assert set(choice.synonyms.values()) <= set(choice.values) and not set(choice.synonyms) & set(words())
        assert {word for value in choice.values for word in value.split()} <= set(words())
    others = [word for choice in choices for word in choice.synonyms]
    assert len(others) == len(set(others)), "a word stands for one thing"


def test_what_is_not_said_differs() -> None:
    assert len({prompts.expand_embedded(f"thing{chr(97 + n)}") for n in range(26)}) > 20


# ---------------------------------------------------------------- in a request


@pytest.fixture(scope="module")
def pipe() -> fastvid.Pipeline:
    return fastvid.load("embedded", device="cpu")


SHORT = {"num_frames": 1, "num_inference_steps": 1, "seed": 3}


def test_the_recipe_keeps_both_and_is_not_expanded_again(pipe: fastvid.Pipeline) -> None:
    video = pipe.generate("blue star, dark", expand_prompt=True, **SHORT)
    recipe = video.recipe
    assert recipe["original_prompt"] == "blue star, dark" and "blue star" in recipe["prompt"]
    assert (video.frames == pipe.generate(recipe["prompt"], **SHORT).frames).all()
    request = fastvid.Request.from_recipe(recipe)
    again = pipe.generate(expand_prompt=True, **request.arguments())
    assert again.recipe == recipe and (again.frames == video.frames).all()
    assert "original_prompt" not in fastvid.Request.from_recipe(recipe, prompt="other").arguments()
    assert pipe.plan("blue star", expand_prompt=True, **SHORT).num_frames == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt_model": "small"}, "without expand_prompt"),
        ({"expand_prompt": True, "prompt_endpoint": "http://a"}, "no use to the embedded model"),
        ({"expand_prompt": "yes"}, "True or False"),
        ({"expand_prompt": True, "prompt": " "}, "words in it"),
        ({"expand_prompt": True, "width": 7}, "width=7"),
    ],
)
def test_expanding_wrongly_is_told(pipe: fastvid.Pipeline, options: dict[str, Any], says: str) -> None:
    with pytest.raises(fastvid.InvalidRequest, match=says):
        pipe.stream(**{"prompt": "a", **options})


def test_other_models_ask_the_endpoint() -> None:
    with endpoint(replying(chat(CAPTION))) as (address, asked):
        options = {"expand_prompt": True, "prompt_endpoint": address, "prompt_model": "m", "prompt_key": KEY}
        made = prompts.expanded(Request.make(prompt="a fox", seed=1, **options), "wan2.1-t2v-14b")
        with pytest.raises(fastvid.InvalidRequest, match="width=7"):
            Request.make(prompt="a fox", width=7, **options)
    assert made.arguments() == {"prompt": CAPTION, "original_prompt": "a fox", "seed": 1} and len(asked) == 1


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "a.npy")
    few = ["--num-frames", "1", "--steps", "1", "--seed", "3", "--quiet", "--json"]
    assert commands.main(["generate", "square, night", "--expand-prompt", "-o", out, *few]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["original_prompt"] == "square, night" and "square" in recipe["prompt"]
    again = str(tmp_path / "b.npy")
    assert commands.main(["generate", "--recipe", out, "-o", again, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == recipe
    assert Path(again).read_bytes() == Path(out).read_bytes()
    assert commands.main(["generate", "a", "--prompt-model", "m", "-o", out, "--quiet"]) == 2
    assert "--prompt-model is given without" in capsys.readouterr().err
