import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import files
from config import ConfigError, Source
from formats import documents


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*paths: Path, **settings) -> tuple[dict[str, str], documents.BadDocuments]:
    bad = documents.BadDocuments()
    source = Source("s", paths=tuple(map(str, paths)), **settings)
    found = list(documents.read(source, bad))
    assert all(document.source == "s" for document in found)
    assert bad.good == len(found)
    return {document.id: document.text for document in found}, bad


def lines(*fields: object) -> str:
    return "".join(json.dumps(field, ensure_ascii=False) + "\n" for field in fields)


def test_a_text_file_is_one_document_whose_line_ends_are_kept(tmp_path):
    write(tmp_path / "a" / "x.txt", b"\xef\xbb\xbfone\r\ntwo\rthr\xc3\xa9e\n\n")
    assert read(tmp_path)[0] == {"a/x.txt": "one\r\ntwo\rthrée\n\n"}


def test_json_lines_give_a_document_a_line_with_its_own_id_or_its_line(tmp_path):
    text = "line\u2028separators and \x85 are no line ends\r\n"
    write(
        tmp_path / "d" / "x.jsonl",
        "\ufeff" + lines({"text": "a"}, {"id": "mine", "text": text}, {"id": 7, "text": "c"}),
    )
    assert read(tmp_path)[0] == {"d/x.jsonl:1": "a", "mine": text, "7": "c"}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"])
def test_compressed_lines_are_the_same_documents(tmp_path, suffix):
    data = lines(*({"text": f"document {n} " * 9999} for n in range(17))).encode()  # several pieces long
    if suffix.endswith("gz"):
        # two members, as `cat a.gz b.gz`
        packed = gzip.compress(data[:50_000]) + gzip.compress(data[50_000:])
    else:
        zstandard = pytest.importorskip("zstandard")
        packed = zstandard.compress(data[:50_000]) + zstandard.compress(data[50_000:])
    path = write(tmp_path / f"x{suffix}", packed)
    assert read(path)[0] == {f"x{suffix}:{n + 1}": f"document {n} " * 9999 for n in range(17)}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz", ".jsonl.zst", ".txt.zst"])
@pytest.mark.parametrize("damage", ["cut off", "not compressed at all"])
def test_a_damaged_compressed_file_is_an_error_that_names_it(tmp_path, suffix, damage):
    data = lines(*({"text": os.urandom(300).hex()} for _ in range(5000))).encode()
    compress = gzip.compress if suffix.endswith("gz") else pytest.importorskip("zstandard").compress
    path = write(tmp_path / f"x{suffix}", compress(data)[:-900] if damage == "cut off" else data[:5000])
    with pytest.raises(ConfigError, match=rf"x{suffix} is cut off or damaged.*exclude it"):
        read(path)


def test_missing_zstandard_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ConfigError, match="pip install zstandard"):
        read(write(tmp_path / "x.jsonl.zst", b"anything"))


def test_parquet_gives_a_document_a_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {n}" for n in range(2500)]
    texts[3], texts[5] = None, ""
    parquet.write_table(
        pyarrow.table({"text": texts, "n": range(2500)}), tmp_path / "a.parquet", row_group_size=700
    )
    found, bad = read(tmp_path)
    assert len(found) == 2498 and found["a.parquet:1"] == "text 0" and found["a.parquet:2500"] == "text 2499"
    assert bad.reasons == {"`text` is not a string": 1, "empty": 1}
    parquet.write_table(pyarrow.table({"id": ["p"], "text": ["q"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0] == {"p": "q"}
    parquet.write_table(pyarrow.table({"body": ["q"]}), tmp_path / "c.parquet")
    with pytest.raises(ConfigError, match=r"c\.parquet has no column `text`.*body"):
        read(tmp_path / "c.parquet")
    write(tmp_path / "d.parquet", b"PAR1 no more")
    with pytest.raises(ConfigError, match=r"d\.parquet is cut off or damaged"):
        read(tmp_path / "d.parquet")


def test_bad_documents_are_counted_by_file_and_line_and_skipped(tmp_path):
    write(
        tmp_path / "x.jsonl",
        b'{"text": "good"}\n'
        b'{"text": "cut\n'
        b'{"body": "none"}\n'
        b'{"text": 5}\n'
        b'["text"]\n'
        b'{"text": "\xff"}\n'
        b'{"text": ""}\n'
        b"\n"
        b'{"text": "half \\ud83d"}\n'
        b'{"text": "whole \\ud83d\\ude00"}',
    )
    write(tmp_path / "y.txt", b"caf\xe9")
    write(tmp_path / "z.txt", b"")
    found, bad = read(tmp_path)
    assert found == {"x.jsonl:1": "good", "x.jsonl:10": "whole 😀"}
    reasons = [
        "not JSON",
        "no `text`",
        "`text` is not a string",
        "not a JSON object",
        "not UTF-8",
        "empty",
        "empty",
    ]
    reasons += ["not Unicode: half of a surrogate pair"]
    assert bad.examples[:8] == [f"{tmp_path}/x.jsonl:{n}: {reason}" for n, reason in enumerate(reasons, 2)]
    assert bad.examples[8:] == [f"{tmp_path}/y.txt: not UTF-8", f"{tmp_path}/z.txt: an empty file"]
    assert bad.reasons["empty"] == 2 and bad.reasons["an empty file"] == 1 and bad.count == 10


def test_only_twenty_examples_are_kept(tmp_path):
    _, bad = read(write(tmp_path / "x.jsonl", "?\n" * 1234))
    assert bad.reasons == {"not JSON": 1234} and len(bad.examples) == 20


def test_folders_give_known_suffixes_sorted_without_hidden_names(tmp_path):
    for name in ("b.md", "a/z.py", "a/b.bin", ".hidden.txt", ".git/x.txt", "c.tar", "a/.x/y.txt", "LICENSE"):
        write(tmp_path / name, "text")
    assert list(read(tmp_path)[0]) == ["a/z.py", "b.md"]
    # named outright
    assert list(read(tmp_path / "LICENSE", tmp_path / "a" / "b.bin")[0]) == ["LICENSE", "b.bin"]


def test_globs_match_any_suffix_and_two_stars_any_depth(tmp_path):
    for name in ("top.x", "a/one.x", "a/b/two.x", "a/b/no.y", "c/b/three.x"):
        write(tmp_path / name, "text")
    assert list(read(tmp_path / "**" / "*.x")[0]) == ["a/b/two.x", "a/one.x", "c/b/three.x", "top.x"]
    assert list(read(tmp_path / "*.x")[0]) == ["top.x"]
    assert list(read(tmp_path / "*" / "b" / "*.x")[0]) == ["a/b/two.x", "c/b/three.x"]
    assert list(read(tmp_path / "a" / "**")[0]) == ["b/no.y", "b/two.x", "one.x"]
    assert list(read(tmp_path / "[ac]" / "b" / "t*")[0]) == ["a/b/two.x", "c/b/three.x"]


def test_no_file_is_read_twice_and_the_first_path_names_it(tmp_path):
    write(tmp_path / "a" / "x.txt", "text")
    write(tmp_path / "a" / "y.txt", "text")
    paths = (tmp_path / "a" / "y.txt", tmp_path, tmp_path / "a" / "..", tmp_path / "**" / "*.txt")
    assert list(read(*paths)[0]) == ["y.txt", "a/x.txt"]


def test_excluded_files_and_folders_are_left_out(tmp_path):
    for name in ("keep.py", "test/a.py", "deep/test/b.py", "deep/keep.py", "deep/skip_me.py"):
        write(tmp_path / name, "text")
    exclude = ("test/*", "*/test/*", "*/skip_*.py")
    assert list(read(tmp_path, exclude=exclude)[0]) == ["deep/keep.py", "keep.py"]
    assert list(read(tmp_path / "**" / "*.py", exclude=exclude)[0]) == ["deep/keep.py", "keep.py"]
    os.chmod(tmp_path / "test", 0)  # an excluded folder is not even opened
    try:
        assert list(read(tmp_path, exclude=exclude)[0]) == ["deep/keep.py", "keep.py"]
    finally:
        os.chmod(tmp_path / "test", 0o700)


def test_links_are_followed_and_a_loop_ends(tmp_path):
    write(tmp_path / "elsewhere" / "x.txt", "text")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    assert list(read(tmp_path / "root")[0]) == ["link/x.txt"]


@pytest.mark.parametrize("path", ["missing.txt", "missing/", "*.nothing", "empty", "empty/**/*.txt"])
def test_a_path_that_matches_nothing_is_named(tmp_path, path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "x.txt", "text")
    with pytest.raises(ConfigError, match="source 's': .*" + path.strip("/").replace("*", r"\*")):
        read(tmp_path / "x.txt", tmp_path / path)
    with pytest.raises(ConfigError, match=r"that \['x\*'\] leaves over"):
        read(tmp_path, exclude=("x*",))


def test_docstrings_are_the_english_of_a_module_in_file_order(tmp_path):
    write(
        tmp_path / "m.py",
        '"""Module\n\n    indented.\n    """\n'
        "raise SystemExit('nothing is executed')\n"
        "class A:\n    def f(self):\n        '''In f.'''\n        def inner():\n            'Inner.'\n"
        "    def no_words(self): pass\n"
        "    'not a docstring'\n"
        "class B:\n    'Of B.'\n"
        'async def g():\n    "With \\d."\n',
    )
    write(tmp_path / "silent.py", "x = 1\n")
    write(tmp_path / "broken.py", "def (:\n")
    write(tmp_path / "note.txt", "not Python, not read")
    found, bad = read(tmp_path, read="docstrings")
    assert found == {"m.py": "Module\n\nindented.\n\nIn f.\n\nInner.\n\nOf B.\n\nWith \\d.\n"}
    assert bad.examples == [f"{tmp_path}/broken.py: not Python to this Python"]


def test_a_table_of_texts_gives_a_document_an_entry(tmp_path):
    write(
        tmp_path / "d" / "topics.py",
        "# made\n'''Doc.'''\ntopics = {'b': 'Text of b', 'a': r'''Text of a'''}\n",
    )
    write(tmp_path / "numbers.py", "'''Not texts.'''\ntable = {'b': 1}\n")
    found, _ = read(tmp_path, read="docstrings")
    assert found == {"d/topics.py#b": "Text of b", "d/topics.py#a": "Text of a", "numbers.py": "Not texts.\n"}


def test_code_and_docstrings_of_a_file_share_its_id(tmp_path):
    write(tmp_path / "p" / "m.py", "'''Words.'''\n")
    assert (
        read(tmp_path)[0].keys() == read(tmp_path / "**" / "*.py", read="docstrings")[0].keys() == {"p/m.py"}
    )


def test_read_text_takes_files_whole(tmp_path):
    path = write(tmp_path / "x.jsonl", lines({"text": "a"}, {"text": "b"}))
    assert read(path, read="text")[0] == {"x.jsonl": path.read_text()}


def test_a_new_kind_of_document_is_one_function_and_its_row(tmp_path, monkeypatch):
    def read_fortunes(path, name):
        for number, text in enumerate(path.read_text().split("%\n"), 1):
            yield f"{path}:{number}", f"{name}:{number}", text

    row = {"fortunes": documents.Reader(read_fortunes, (".fortune",))}
    monkeypatch.setattr(documents, "READERS", {**row, **documents.READERS})
    write(tmp_path / "d" / "x.FORTUNE", "one\n%\n%\ntwo\n")
    write(tmp_path / "d" / "y.txt", "text")
    found, bad = read(tmp_path / "d")
    assert found == {"x.FORTUNE:1": "one\n", "x.FORTUNE:3": "two\n", "y.txt": "text"}
    assert bad.examples == [f"{tmp_path}/d/x.FORTUNE:2: empty"]


def test_reading_streams_a_large_file(tmp_path):
    path = write(tmp_path / "x.jsonl", lines({"text": "first"}) + "x" * 50_000_000)
    stream = documents.read(Source("s", paths=(str(path),)))
    assert next(stream).text == "first"  # before the end of the file, or its broken second line, was met


def test_names_and_ids_that_are_no_unicode_are_made_encodable_and_the_file_is_read(tmp_path):
    names = [os.fsdecode(b"caf\xe9.txt"), os.fsdecode(b"\xff.jsonl")]
    write(tmp_path / "d" / names[0], "one")
    write(
        tmp_path / "d" / names[1], '{"text": "two", "id": "half \\ud83d"}\n{"text": "three"}\n{"body": 1}\n'
    )
    found, bad = read(tmp_path)
    assert found == {"d/caf\\udce9.txt": "one", "half \\ud83d": "two", "d/\\udcff.jsonl:2": "three"}
    for name in (*found, *bad.examples):
        name.encode()
    assert bad.examples == [f"{tmp_path}/d/\\udcff.jsonl:3: no `text`"]


def test_a_log_takes_what_is_no_unicode_from_an_older_dataset(tmp_path):
    record = {"documents": [["code", os.fsdecode(b"caf\xe9.py")], ["web", "\ud83d"]], "é": "😀"}
    files.append(tmp_path / "ledger.jsonl", record)
    files.write_json(tmp_path / "record.json", record)
    assert files.read_lines(tmp_path / "ledger.jsonl") == [record]
    assert json.loads((tmp_path / "record.json").read_bytes()) == record


@pytest.mark.parametrize(
    "name", ["x.txt", "x.jsonl", "x.jsonl.gz", "x.json.zst", "x.json", "x.txt.gz", "x.parquet"]
)
def test_a_file_of_no_bytes_is_named(tmp_path, name):
    write(tmp_path / "good.txt", "text")
    found, bad = read(tmp_path / "good.txt", write(tmp_path / name, b""))
    assert found == {"good.txt": "text"} and bad.examples == [f"{tmp_path}/{name}: an empty file"]


def test_suffixes_may_be_in_capitals(tmp_path):
    write(tmp_path / "d" / "A.TXT", "a")
    write(tmp_path / "d" / "B.JSONL.GZ", gzip.compress(lines({"text": "b"}).encode()))
    write(tmp_path / "d" / "C.Py", "c")
    assert read(tmp_path)[0] == {"d/A.TXT": "a", "d/B.JSONL.GZ:1": "b", "d/C.Py": "c"}
    assert read(write(tmp_path / "M.PY", '"""doc"""'), read="docstrings")[0] == {"M.PY": "doc\n"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "a"}\n{"text": "b", "id": "mine"}\n', {"x.json:1": "a", "mine": "b"}),
        ('\n[{"text": "a"},\n {"id": 7, "text": "b"}]', {"x.json:1": "a", "7": "b"}),
        ('[{"text": "a"}]', {"x.json:1": "a"}),
        ('{\n "text": "a"\n}', {"x.json": "a"}),
    ],
)
def test_a_plain_json_is_lines_or_an_array_or_an_object(tmp_path, content, expected):
    path = write(tmp_path / "x.json", content)
    assert read(path)[0] == read(tmp_path / "*.json")[0] == expected


@pytest.mark.parametrize("broken", ['{"text": "cut o', "null", "7", "[1, 2", '{"text": 3}'])
def test_a_broken_first_line_does_not_lose_the_lines_after_it(tmp_path, broken):
    lines = [broken, *(json.dumps({"text": f"line {n}"}) for n in range(5))]
    (tmp_path / "x.json").write_text("\n".join(lines))
    bad = documents.BadDocuments()
    found = list(documents.read(Source("s", paths=(str(tmp_path / "x.json"),)), bad))
    assert [d.text for d in found] == [f"line {n}" for n in range(5)] and bad.count == 1
    assert [d.id for d in found] == [f"x.json:{n}" for n in range(2, 7)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not JSON"), ('{"a": 1}', "no `text`"), ("[1]", "not a JSON object"), ("3", "not a JSON object")],
)
def test_a_plain_json_of_anything_else_is_named(tmp_path, content, reason):
    found, bad = read(write(tmp_path / "x.json", content))
    assert not found and list(bad.reasons) == [reason]


def test_what_a_folder_does_not_give_is_said_once_by_suffix(tmp_path, capsys):
    for name in ("a.txt", "b.json", "c/d.JSON", "e.pdf", ".hidden.pdf", "skip/f.pdf", "LICENSE"):
        write(tmp_path / name, "text")
    source = Source("s", paths=(str(tmp_path), str(tmp_path / "LICENSE")), exclude=("skip/*",))
    documents.tell_left_out(source)
    assert capsys.readouterr().out == (
        "note: source 's': 3 files were not read (.json 2, .pdf 1); name them outright or with a glob to "
        "read them\n"
    )
    documents.tell_left_out(Source("s", paths=(str(tmp_path / "*.pdf"),)))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"no file that can be read.*f\.pdf and the like outright"):
        documents.listed(Source("s", paths=(str(tmp_path / "skip"),)))


def test_a_dataset_of_odd_names_is_built_and_said_into_any_pipe(tmp_path):
    for n in range(60):
        write(tmp_path / "text" / os.fsdecode(b"caf\xe9 %d.txt" % n), f"{n} sheep and {n * n} goats. " * 9)
    write(tmp_path / "text" / os.fsdecode(b"\xff.txt"), b"\xff")
    write(tmp_path / "text" / "x.json", b"{}")
    write(
        tmp_path / "my.py",
        "from config import *\n"
        "config = Config(model=Model(vocab_size=300, seq_len=24, d_model=8, n_heads=2), "
        "tokenizer=Tokenizer(vocab_size=300), eval=Eval(prompt_tokens=8, continuation_tokens=8), "
        "data=Data(sources=(Source('s', paths=('text',)),), validation_fraction=0.2, max_bad_fraction=0.1, "
        "n_chunks=2, workers=1), train=Train(batch_size=4, micro_batch_size=4))",
    )
    for command in (["tokenizer.py", "train"], ["data.py"]):
        done = subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:], "my.py"],
            cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(b"1 file was not read (.json 1)") == 1
    assert rb"text/\udcff.txt: not UTF-8" in done.stdout
