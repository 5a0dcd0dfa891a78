"""Malformed list files, shards and other files of a dataset are read, or are an error of one line."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from helpers.bad_input import Trial, cases, encoded_image, one_line, pytestmark, values  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st

from data_tools import check
from vit_static.common.errors import DataError
from vit_static.config.data_schema import DataConfig
from vit_static.data.image_set import FileDataset
from vit_static.data.imagenet_eval import with_real_labels
from vit_static.data.open_set import count_classes, open_set

list_labels = st.sampled_from(["0", "1", "2"]) | st.sampled_from(
    ["", "0,1", "-1", "+1", "1.0", "999999999", "9999999999", "1e3", "x", "1,", ",1", "0,,1", "\u0663", "0x1", "nan"]
)
list_paths = st.sampled_from(["a.jpg", "b c.jpg", "/etc/passwd"]) | st.sampled_from(
    ["../x.jpg", "none.jpg", "", " ", "é.jpg", "\0", "x" * 9000]
)
list_lines = st.builds("{}{}{}".format, list_paths, st.sampled_from([" ", "\t", "  ", "\t\t", "", ","]), list_labels)
list_texts = st.lists(
    list_lines | st.sampled_from(["", " ", "\t", "#", "\r", "\x1c", "\u2028"]) | st.text(max_size=20), max_size=6
).flatmap(lambda lines: st.sampled_from(["\n", "\r\n", "\r", "\n\n"]).map(lambda end: end.join(lines)))


@cases(400)
@given(
    list_texts.flatmap(
        lambda text: st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"]).map(
            lambda name: text.encode(name, "ignore")
        )
    )
    | st.binary(max_size=40),
    st.booleans(),
)
def test_malformed_lists_are_read_or_refused(trial: Trial, content: bytes, multi_label: bool) -> None:
    (trial.folder / "a.jpg").write_bytes(b"x")
    (trial.folder / "train.txt").write_bytes(content)
    with trial.of("list files", "train.txt"):
        data = DataConfig(root=str(trial.folder), train="train.txt", multi_label=multi_label)
        images = open_set(data, "train", 3)
        assert isinstance(images, FileDataset) and len(images) and images.digest()
        for index in range(len(images)):
            assert images.image_list.labels[index].max() < 3
            try:
                images.read(index)
            except DataError as error:
                assert str(error).isprintable()


table_cells = st.sampled_from(["a.jpg", "0", "1", "cat", ""]) | st.sampled_from(
    ['"', '"x"', "1.0", "nan", ",", ";", "\0", "é", "x" * 200_000]
)
table_rows = (
    st.sampled_from(["a.jpg,0", "b.jpg,1"]) | st.lists(table_cells, max_size=3).map(",".join) | st.text(max_size=20)
)
table_texts = st.lists(table_rows, max_size=4).flatmap(
    lambda lines: st.sampled_from(["\n", "\r\n", "\r"]).map(lambda end: end.join(["path,label", *lines]))
)


@cases(300)
@given(
    table_texts.flatmap(
        lambda text: st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]).map(
            lambda name: text.encode(name, "ignore")
        )
    )
    | st.binary(max_size=60),
    st.sampled_from(["csv", "tsv", "parquet"]),
    st.booleans(),
)
def test_malformed_tables_are_read_or_refused(trial: Trial, content: bytes, suffix: str, multi_label: bool) -> None:
    """With one or two classes, by names or numbers."""
    (trial.folder / f"train.{suffix}").write_bytes(content)
    with trial.of("tables", f"train.{suffix}"):
        data = DataConfig(root=str(trial.folder), train=f"train.{suffix}", multi_label=multi_label)
        images = open_set(data, "train", min(count_classes(data, "train"), 2))
        assert len(images) and images.digest()
        assert images.labels().values.max(initial=0) < 2


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("\ufeffa.jpg 1\r\nb.jpg 0".encode())
    images = open_set(DataConfig(root=str(tmp_path), train="train.txt"), "train", 2)
    assert [images.relative_name(index) for index in range(2)] == ["a.jpg", "b.jpg"]


index_numbers = st.sampled_from(
    ["0", "512", "600", "3", "1024", "-1", "2000", str(2**63), "9" * 5000, "x", "1.0", "\u0661", "1_0", ""]
)
index_fields = st.builds(
    "{} {} {} {}".format, st.sampled_from(["jpg", "cls", "JPG", "json", ""]), *[index_numbers] * 2, st.just("a.jpg")
)
index_texts = st.builds(
    lambda first, lines: "\n".join([first.format(len(lines)), *lines]),
    st.sampled_from(
        ["v1.2 {}", "v1.2 {}", "v1.1 {}", "v1.2 99", "v2 {}", "", "{}", "v1.2 {} {}".replace("{} {}", "{} 1")]
    ),
    st.lists(
        st.builds("{} {}".format, index_fields, index_fields)
        | st.builds("jpg {} {} a.jpg cls {} {} a.cls".format, *[index_numbers] * 4)
        | st.text(max_size=20),
        max_size=3,
    ),
)


@cases(300)
@given(
    index_texts.map(lambda text: text.encode("utf-8", "ignore")) | st.binary(max_size=60),
    st.sampled_from(
        [b"0", b"1", b"7", b"-1", b"0,1", b"", b"x", b"1.0", b"9" * 20, b"9" * 5000, b"\xff", b"1_0", b" 1\n"]
    ),
    st.booleans(),
)
def test_malformed_shards_are_read_or_refused(trial: Trial, index: bytes, label: bytes, multi_label: bool) -> None:
    """A tar file with an image and a label, and any index."""
    folder = trial.folder / "shards" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.jpg", b"image"), ("a.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (folder / "0.tar").write_bytes(file.getvalue())
    valid = f"v1.2 1\njpg 512 5 a.jpg cls 1536 {len(label)} a.cls\n".encode()
    (folder / "0.idx").write_bytes(index if len(index) % 4 else valid)
    with trial.of("shards", "0.idx", "0.tar", "its shards"):
        images = open_set(DataConfig(root=str(folder.parent), multi_label=multi_label), "train", 2)
        assert images.digest()
        for number in range(len(images)):
            _, labels = images.read(number)
            assert labels.min(initial=0) >= 0 and labels.max(initial=0) < 2 and (len(labels) or multi_label)


problem_entries = st.fixed_dictionaries(
    {},
    optional={
        "path": values.map(repr) | st.sampled_from(["train/a/1.png", "\ud800", 7, None]),
        "stops_training": st.booleans() | st.none(),
    },
)
report_texts = (st.lists(problem_entries, max_size=3) | st.just(7)).map(
    lambda problems: json.dumps({"problems": problems})
)
journal_entries = st.fixed_dictionaries(
    {},
    optional={
        "split": st.sampled_from(["train", [], None]),
        "start": st.sampled_from([0, "0", [], -1]),
        "state": st.sampled_from(["x", None]),
        "digests": st.just([1]),
        "problems": st.just([{}]),
        "train": st.just(""),
    },
)
journal_texts = st.lists(journal_entries | st.just([]) | st.none(), max_size=3).map(
    lambda entries: "\n".join(map(json.dumps, entries))
)


@cases(120)
@given(
    st.sampled_from(["data_check.json", ".data_check.journal", "class_names.txt"]),
    st.binary(max_size=40) | report_texts.map(str.encode) | journal_texts.map(str.encode) | st.just(b"[" * 100_000),
)
def test_malformed_files_beside_images_are_read_or_refused(trial: Trial, name: str, content: bytes) -> None:
    folder = trial.folder / "set"
    (folder / "train/a").mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.is_file():
            old.unlink()
    (folder / "train/a/1.png").write_bytes(encoded_image("RGB", "PNG", (48, 64)))
    (folder / name).write_bytes(content)
    with trial.of(f"files beside images: {name}", name, "all of its images as bad"):
        if name.endswith("journal"):
            assert check.main([str(folder)]) == 0
        skip = "skip" if name == "data_check.json" else "stop"
        assert len(open_set(DataConfig(root=str(folder), on_bad_image=skip), "train", 1)) == 1


def test_invalid_journal_entries_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Entries with the right state and invalid content."""
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.png").write_bytes(encoded_image("RGB", "PNG", (48, 64)))
    journal = tmp_path / ".data_check.journal"
    sets, _ = check.open_splits(tmp_path, {"train": tmp_path / "train"})
    state = hashlib.blake2b(repr([check.file_state(sets["train"], 0)]).encode(), digest_size=8).hexdigest()
    for digests, problems in (([], []), (["x"], []), ([1], [{"x": 1}]), ([-1], []), ([1], 7), (None, [])):
        entry = {"split": "train", "start": 0, "state": state, "digests": digests, "problems": problems}
        journal.write_text(json.dumps({"train": sets["train"].digest()}) + "\n" + json.dumps(entry))
        assert check.main([str(tmp_path)]) == 0
        assert "nothing would stop training" in capsys.readouterr().out


real_texts = [
    "[[0], [1]]",
    "[]",
    "[[]]",
    "[[0], 1]",
    "[[true]]",
    "[[1.0]]",
    "[[-1]]",
    "[[99]]",
    "{}",
    "[" * 99_999,
    "7",
]
real_values = st.recursive(
    st.integers(-1, 3) | st.just(10**30) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=8
)


@cases(150)
@given(
    st.sampled_from(real_texts).map(str.encode) | real_values.map(json.dumps).map(str.encode) | st.binary(max_size=30)
)
def test_malformed_real_labels_are_read_or_refused(trial: Trial, content: bytes) -> None:
    name = b"ILSVRC2012_val_00000001.JPEG"
    images = FileDataset(trial.folder, one_line(name), ["a", "b"])
    (trial.folder / "real.json").write_bytes(content)
    with trial.of("real.json", "real.json"):
        relabelled = with_real_labels(images, trial.folder / "real.json", 2)
        assert all(relabelled.image_list.labels[index].max() < 2 for index in range(len(relabelled)))
