"""Files and folders are created with the user's umask, also by the libraries that write them."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.forked_verbs import start_verb
from helpers.tiny import tiny_model
from safetensors.numpy import save_file

from vit_static.common.io import write_atomically


def modes_of(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_a_file_of_a_library_has_the_mode_of_a_file_of_python(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").touch()
        with write_atomically(tmp_path / "weights.safetensors") as temporary:
            save_file({"a": np.zeros(3, np.float32)}, temporary)
        assert os.umask(umask) == umask  # read, and not changed
    finally:
        os.umask(before)
    modes = modes_of(tmp_path)
    assert modes["weights.safetensors"] == modes["plain"] == 0o666 & ~umask


def test_reading_the_umask_does_not_change_it_for_other_threads(tmp_path: Path) -> None:
    """Otherwise a file that another thread creates at that moment would get other permissions."""
    has_ended = threading.Event()
    modes: set[int] = set()

    def create_files() -> None:
        while not has_ended.is_set():
            path = tmp_path / "other"
            path.touch()
            modes.add(stat.S_IMODE(path.stat().st_mode))
            path.unlink()

    before = os.umask(0o022)
    thread = threading.Thread(target=create_files)
    try:
        thread.start()
        for _ in range(200):
            with write_atomically(tmp_path / "file") as temporary:
                temporary.touch(0o600)
    finally:
        has_ended.set()
        thread.join()
        os.umask(before)
    assert modes == {0o644}


@pytest.mark.slow
def test_a_run_and_what_is_made_of_it_have_the_users_umask(tmp_path: Path, small_digits: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(
        tiny_model() + f"data: {{root: {small_digits}, global_batch_size: 16, num_threads: 1}}\n"
        "train: {max_steps: 1}\noptim: {ema_decay: 0.5}\n"
    )
    for words in (
        ["pretrain", "-c", "tiny.yaml"],
        ["export", "--checkpoint", "output/tiny", "--out", "exported", "-o", "export.pixels=true"],
        ["convert", "--from", "output/tiny", "--to", "hub/model.safetensors", "--format", "huggingface"],
    ):
        verb = start_verb(words, tmp_path, tmp_path / "printed", before="import os; os.umask(0o027)")
        assert verb.wait() == 0, (tmp_path / "printed").read_text()
    given = {"printed", "tiny.yaml"}
    wrong = {
        name: oct(mode)
        for name, mode in modes_of(tmp_path).items()
        if name not in given and mode != (0o750 if (tmp_path / name).is_dir() else 0o640)
    }
    assert not wrong
