"""A teacher on another machine: the same training as from a folder, servers killed, gone, slow, lying or without the key."""

import hashlib
import http.client
import os
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from forks import Fork
from test_train_cache import cached, write_recipe
from test_train_stages import metrics, refused, weights

from cdistill.cli import main
from cdistill.runtime.errors import RunError
from cdistill.train import cache, cache_client, cache_writer, run
from cdistill.train.cache import MissingShards
from cdistill.train.cache_client import NoAnswer, Served
from cdistill.train.cache_server import CacheServer, ServedStage, listen
from cdistill.train.cache_wire import DIGEST, KEY, NONCE, SIGNATURE, signature

SECRET = "only for two machines"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(cache_client, "FIRST_SECONDS", 0.2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(recipe, path, port, *options):
    arguments = ["cache", write_recipe(recipe, path), "--serve", f"127.0.0.1:{port}", *options]
    plan = {"set": ["cdistill.train.cache_writer", "PER_SHARD", 2]}
    return Fork("survive_runs:carry_out_command", arguments, plan, env=dict(os.environ))


def test_a_run_from_a_server_that_is_killed_is_a_run_from_a_folder(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PER_SHARD", 2)
    folder = cached(tmp_path / "folder", models, tmp_path / "cache")
    cache_writer.write_cache(folder)
    expected = weights(run(folder))
    monkeypatch.setattr(cache_client, "FIRST_SECONDS", 100.0)  # a server begins with loading its models
    port, asked = free_port(), []
    to_serve = cached(tmp_path / "unused", models, tmp_path / "window")
    servers = [start(to_serve, tmp_path / "serve.yaml", port, "--window", "2")]
    ask = Served._ask

    def ask_and_kill(self, path):
        asked.append(path)
        if path.endswith("2-dft/shard-00002.safetensors") and len(servers) == 1:
            servers[0].kill()
            servers[0].wait()
            servers.append(start(to_serve, tmp_path / "serve.yaml", port, "--window", "2"))
        return ask(self, path)

    monkeypatch.setattr(Served, "_ask", ask_and_kill)
    try:
        final = run(cached(tmp_path / "run", models, f"http://127.0.0.1:{port}"))
    finally:
        servers[-1].send_signal(15)
        code = servers[-1].wait()
    assert all(torch.equal(x, expected[name]) for name, x in weights(final).items())
    assert metrics(tmp_path / "run")[-1]["vat"] == metrics(tmp_path / "folder")[-1]["vat"]
    assert len(servers) == 2 and code == 0, servers[-1].text()
    left = sorted(path.name for path in (tmp_path / "window" / "2-dft").glob("*.safetensors"))
    assert left == [f"shard-{i:05d}.safetensors" for i in (3, 4, 5)], "the disk holds the window"
    assert not (tmp_path / "unused").exists()


def test_recipes_that_do_not_fit_the_server(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PER_SHARD", 4)
    kept = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    cache_writer.write_cache(kept)
    with serving(tmp_path / "cache" / "1-dft", shards=3, there={0, 1, 2}) as (url, _):
        other = cached(tmp_path / "run", models, url, stages=["dft"], seed=1)
        refused(
            other, tmp_path / "run", rf"^teacher_memory.cache: {url}\S* was made with another seed; serve this recipe"
        )
        first = cached(tmp_path / "run", models, url, stages=["dpt"])
        refused(first, tmp_path / "run", r"refuses index.json: this server has stages 1-dft$")
        monkeypatch.setenv(KEY, "short")
        refused(first, tmp_path / "run", rf"^{KEY} must have at least 16 characters, got 5$")
        monkeypatch.delenv(KEY)
        refused(first, tmp_path / "run", rf"needs {KEY} in the environment, as the server has it$")
    monkeypatch.setenv(KEY, SECRET)
    refused(first, tmp_path / "run", r"does not answer \(.*refused\): see whether `cdistill cache --serve` runs there")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--serve", "8460"], "--serve must be HOST:PORT, such as 0.0.0.0:8460, got '8460'"),
        (["--serve", "127.0.0.1:0", "--window", "1"], "--window must be at least 2 shards, got 1"),
        (["--window", "3"], "--window needs --serve"),
        (["--serve", "127.0.0.1:0", "processes=2"], "--serve needs processes 1"),
        (["--serve", "127.0.0.1:0", "deepspeed=2", "teacher_memory.zero=3"], "--serve needs teacher_memory.zero off"),
        (["teacher_memory.cache=http://there:80"], "must name a folder to write, got http://there:80"),
        (["--serve", "host.invalid:1"], "--serve host.invalid:1: "),
    ],
)
def test_what_cannot_be_served(models, tmp_path, capsys, words, message):
    path = write_recipe(cached(tmp_path / "run", models, tmp_path / "cache"), tmp_path / "r.yaml")
    recipes, options = [w for w in words if "=" in w], [w for w in words if "=" not in w]
    assert main(["cache", path, *recipes, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["ftp://host:1", "http://", "http://host:99999", "http://user:word@host:1", "http://host/x"]
)
def test_what_is_no_server(models, tmp_path, url):
    refused(
        cached(tmp_path / "run", models, url), tmp_path / "run", r"must be a folder or http://HOST:PORT of `cdistill"
    )


@contextmanager
def serving(folder, *, shards, there=frozenset(), make=lambda work: None, window=None, samples=None):
    """URL of a server of one stage, whose shards somebody else makes, and the server."""
    work = MissingShards(shards * 4 if samples is None else samples, 4, sorted(set(range(shards)) - set(there)))
    server = CacheServer([ServedStage("1-dft", folder, work, make, lambda: None)], SECRET.encode(), window)
    request = SimpleNamespace(received=0)
    with ExitStack() as at_end:
        port = listen(server, ("127.0.0.1", 0), at_end)
        thread = threading.Thread(target=server.work, args=(request,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}", server
        finally:
            request.received = 15
            thread.join()


def shard_file(folder, shard, content):
    cache.shard_path(folder, shard).write_bytes(content)
    cache.shard_path(folder, shard).with_suffix(".json").write_text("[]")


def test_what_is_asked_for_is_made_first_and_the_window_bounds_the_rest(tmp_path):
    order = []

    def make(work):
        order.append(work.missing[0])
        shard_file(tmp_path, work.missing[0], b"%d" % work.missing[0])

    with serving(tmp_path, shards=20, make=make, window=3) as (url, server):
        wait_for(lambda: order == [0, 1, 2, 3])
        time.sleep(0.1)
        assert order == [0, 1, 2, 3], "nobody has asked: it waits"
        client = Served(url, "1-dft", 10)
        assert client.shard(11) == b"11"
        wait_for(lambda: order[4:] == [11, 12, 13, 14])
        assert sorted(server.stages["1-dft"].there) == [11, 12, 13, 14]
        assert len(list(tmp_path.glob("*.safetensors"))) == 4
        assert client.shard(2) == b"2", "a run that goes back is given what has been dropped"
        client.shards = 20
        assert [client.shard(i) for i in range(10, 20)] == [b"%d" % i for i in range(10, 20)]


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come")


def test_a_slow_teacher_is_waited_for_and_a_stuck_one_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("cdistill.train.cache_server.POLL_SECONDS", 0.02)
    release = threading.Event()
    with serving(tmp_path, shards=1, make=lambda work: release.wait(60)) as (url, server):
        with pytest.raises(
            RunError, match=rf"^teacher_memory.cache: {url} answers, but its teacher has made no sample, for "
        ):
            Served(url, "1-dft", 0.3).shard(0)

        def progress():
            for _ in range(10):
                time.sleep(0.1)  # ten times as long as a client waits without progress, in all
                server.count(1)
            shard_file(tmp_path, 0, b"late")
            release.set()

        threading.Thread(target=progress, daemon=True).start()
        assert Served(url, "1-dft", 0.6).shard(0) == b"late"


def test_a_server_that_is_gone_later_on_ends_the_run_in_a_line(tmp_path):
    shard_file(tmp_path, 0, b"0")
    with serving(tmp_path, shards=2, there={0}) as (url, _):
        client = Served(url, "1-dft", 0.3)
        assert client.shard(0) == b"0"
    with pytest.raises(RunError, match=r"does not answer \(.*\): see whether .* for \d+ s; go on with --resume$"):
        client.shard(1)


def raw(url, path, headers):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def test_nobody_without_the_key_is_answered_or_believed(tmp_path):
    shard_file(tmp_path, 0, b"secret")
    (tmp_path / "index.json").write_text("{}")
    nonce, path = "0" * 32, "/cdistill-cache-1/1-dft/shard-00000.safetensors"
    with serving(tmp_path, shards=1, there={0}) as (url, _):
        good = {NONCE: nonce, SIGNATURE: signature(SECRET.encode(), "request", path, nonce)}
        status, head, body = raw(url, path, good)
        assert (status, body) == (200, b"secret")
        assert head[SIGNATURE] == signature(SECRET.encode(), "answer", path, nonce, "200", head[DIGEST])
        for bad in (
            {},
            good | {NONCE: "1" * 32},
            good | {NONCE: ""},
            good | {SIGNATURE: "0" * 64},
            good | {SIGNATURE: "ü"},
        ):
            assert raw(url, path, {k: v.encode("latin-1") for k, v in bad.items()})[0] == 403
        for other in (path.replace("1-dft/", "1-dft/../"), "/cdistill-cache-1/1-dft/../../etc/passwd", path + "x", "/"):
            assert raw(url, other, good)[0] == 403, "the signature is of one path"
            signed = {NONCE: nonce, SIGNATURE: signature(SECRET.encode(), "request", other, nonce)}
            assert raw(url, other, signed)[0] == 404
        client = Served(url, "1-dft", 0.2)
        client._key = b"the key of someone else"
        with pytest.raises(NoAnswer, match=f"with status 403, not signed with this {KEY}"):
            client._ask(path)


@contextmanager
def answering(answer):
    """URL of something that sends these bytes whatever is asked; ``answer`` makes them of the request's headers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        text = connection.recv(65536).decode()
                        head = dict(line.split(": ", 1) for line in text.split("\r\n")[1:] if ": " in line)
                        connection.sendall(answer({k.lower(): v for k, v in head.items()}))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def reply(body, digest, signed, length=None):
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {length or len(body)}\r\n{DIGEST}: {digest}\r\n{SIGNATURE}: {signed}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("lie", ["other bytes", "an old answer", "no HTTP", "cut", "huge"])
def test_a_server_that_lies_is_not_believed(lie):
    path, key = "/cdistill-cache-1/1-dft/shard-00000.safetensors", SECRET.encode()

    def answer(head):
        body, nonce = b"numbers", head[NONCE.lower()]
        digest = hashlib.sha256(body).hexdigest()
        nonce = "0" * 32 if lie == "an old answer" else nonce
        signed = signature(key, "answer", path, nonce, "200", digest)
        if lie == "no HTTP":
            return b"\x00\xff garbage\r\n\r\n"
        if lie == "huge":
            return reply(b"", digest, "0" * 64, 10**15)
        return reply(b"nimbers" if lie == "other bytes" else body, digest, signed, 99 if lie == "cut" else None)

    with answering(answer) as url, pytest.raises(NoAnswer):
        Served(url, "1-dft", 1.0)._ask(path)


def shard_tensors():
    return {
        "values": torch.tensor([[-0.1, -3.0], [-0.5, -1.5], [-0.7, -0.7]]),
        "indices": torch.tensor([[3, 1], [0, 6], [2, 5]], dtype=torch.int32),
        "targets": torch.full((2 * 3 * 4,), 0.1, dtype=torch.bfloat16),
        "answers": torch.tensor([2, 1]),
        "shapes": torch.tensor([[2, 3, 4, -1], [2, 0, 4, -1]]),
        "tokens": torch.tensor([5, 6]),
    }


def test_a_shard_as_it_is_made_has_no_fault():
    assert cache.fault_of(shard_tensors(), 2, 7) is None


@pytest.mark.parametrize(
    ("name", "place", "value", "fault"),
    [
        ("values", (0, 0), 0.5, "log-probabilities"),
        ("values", (0, 1), float("nan"), "log-probabilities"),
        ("values", (1, 1), -0.2, "log-probabilities"),
        ("indices", (0, 0), 7, "ids of tokens"),
        ("indices", (0, 0), -1, "ids of tokens"),
        ("indices", (1, 1), 0, "ids of tokens"),
        ("targets", 3, float("inf"), "shares of attention"),
        ("targets", 3, -0.1, "shares of attention"),
        ("targets", 3, 2.0, "shares of attention"),
        ("answers", 0, 3, "numbers of labelled tokens"),
        ("shapes", (0, 0), 3, "shapes of slices"),
    ],
)
def test_numbers_that_no_teacher_gives(name, place, value, fault):
    tensors = shard_tensors()
    tensors[name][place] = value
    assert cache.fault_of(tensors, 2, 7) == fault


def test_tensors_that_are_missing_or_of_other_samples():
    tensors = shard_tensors()
    assert cache.fault_of({k: v for k, v in tensors.items() if k != "tokens"}, 2, 7) == "no tokens"
    assert cache.fault_of(tensors, 3, 7) == "other than 3 samples"
    assert cache.fault_of(tensors | {"indices": tensors["indices"].float()}, 2, 7) == "a dtype"


def test_a_damaged_value_in_a_folder_is_told_too(models, tmp_path):
    from safetensors.torch import load_file, save_file

    from cdistill.manifest import stored

    recipe = cached(tmp_path / "run", models, tmp_path / "cache", stages=["dft"])
    cache_writer.write_cache(recipe)
    path = tmp_path / "cache" / "1-dft" / "shard-00000.safetensors"
    tensors = load_file(path)
    tensors["values"][0, 0] = float("nan")
    save_file(tensors, path)
    path.with_suffix(".json").write_text(str(list(stored(path))))
    with pytest.raises(ValueError, match=r"shard-00000.safetensors holds what no teacher gives \(log-probabilities\)"):
        run(recipe)
