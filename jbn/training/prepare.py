"""Prepares a TFDS data set on disk, or quickly reports what to do by hand."""

import contextlib
import difflib
import importlib.util
import io
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.download_manager import (
    NonMatchingChecksumError,
)
from tensorflow_datasets.core.registered import DatasetNotFoundError

from jbn.training import idx
from jbn.training.errors import UsageError, one_line


FILE_FORMAT = "array_record"  # The file format that is read without TensorFlow.
_PROBE_SECONDS = 5.0


def is_prepared(builder: Any) -> bool:
    """Whether the data set is already in its folder."""
    return (Path(builder.data_dir) / "dataset_info.json").exists()


def prepare(builder: Any, manual_dir: Path | None) -> None:
    """Writes the data set into its folder, from a download or from local files.

    Args:
        builder: The TFDS builder.
        manual_dir: Folder in which to look for the original files first.

    Raises:
        UsageError: If the files are missing and cannot be downloaded, if they are not
            the original ones, or if TensorFlow is needed but not installed.
    """
    if manual_dir is not None and not manual_dir.is_dir():
        raise UsageError(f"--manual-dir={manual_dir} is not a folder.")
    missing = _missing_files(builder, manual_dir)
    failure = _probe(missing) if missing else None
    if failure:
        raise UsageError(_by_hand(builder, missing, failure, manual_dir))
    if _needs_tensorflow(builder):
        raise UsageError(
            f"`{builder.name}` is not prepared in {builder.data_dir}, and preparing it "
            "needs TensorFlow, which is not installed. `pip install tensorflow` and "
            "run this again: it is needed once, not for reading."
        )
    config: dict[str, Any] = {"manual_dir": manual_dir} if manual_dir else {}
    own = not builder.url_infos or not missing
    quiet = (
        contextlib.redirect_stdout(io.StringIO()) if own else contextlib.nullcontext()
    )
    (tfds.disable_progress_bar if own else tfds.enable_progress_bar)()
    try:
        with quiet:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(**config),
                file_format=FILE_FORMAT,
            )
    except (
        ImportError,
        OSError,
        RuntimeError,  # ArrayRecord's, if it cannot write.
        ValueError,
        tfds.download.DownloadError,
        NonMatchingChecksumError,
    ) as error:
        if is_prepared(builder):  # Another process was faster.
            builder.info.read_from_directory(builder.data_dir)
            return
        raise UsageError(
            f"Preparing `{builder.name}` in {builder.data_dir} failed: "
            f"{one_line(error)}"
        ) from error


def _missing_files(builder: Any, manual_dir: Path | None) -> list[str]:
    """The URLs of the files that are not in `manual_dir`."""
    infos = builder.url_infos or {}
    return [
        url
        for url, info in infos.items()
        if manual_dir is None or not (manual_dir / info.filename).exists()
    ]


def _needs_tensorflow(builder: Any) -> bool:
    """Whether TFDS's own builder is used, and TensorFlow is not installed."""
    own = type(builder).__module__.startswith("jbn.")
    return not own and importlib.util.find_spec("tensorflow") is None


def _probe(urls: list[str]) -> str | None:
    """Requests one URL of each host (at most three); the error if none answers."""
    by_host = {urllib.parse.urlsplit(url).hostname: url for url in reversed(urls)}
    failures: dict[str, str] = {}

    def ask(host: str, url: str) -> None:
        try:
            urllib.request.urlopen(url, timeout=_PROBE_SECONDS).close()
            failures.pop(host)
        except urllib.error.HTTPError as error:
            failures[host] = f"HTTP status {error.code}"
        except (OSError, ValueError) as error:
            failures[host] = str(getattr(error, "reason", error))

    threads = []
    for host, url in list(by_host.items())[:3]:
        failures[str(host)] = f"no answer in {_PROBE_SECONDS:g} s"
        # A name lookup has no timeout, so it runs in threads that can be abandoned.
        thread = threading.Thread(target=ask, args=(str(host), url), daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join(_PROBE_SECONDS)
    if len(failures) < len(threads):
        return None
    return "; ".join(f"{host}: {reason}" for host, reason in failures.items())


def _by_hand(
    builder: Any, missing: list[str], failure: str, manual_dir: Path | None
) -> str:
    """The message for a set that is neither prepared nor downloadable."""
    where = f" and not in --manual-dir={manual_dir}" if manual_dir else ""
    lines = [
        f"`{builder.name}` is not prepared in {builder.data_dir}, and its files "
        f"cannot be downloaded ({failure}).",
        "",
        f"By hand: download these files, which are missing{where},",
        *(f"    {url}" for url in missing[:8]),
        *([f"    and {len(missing) - 8} more"] if len(missing) > 8 else []),
        "into one folder, and add --manual-dir=FOLDER to the command.",
        f"Or copy {builder.data_dir} from a machine where it is prepared as "
        f"{FILE_FORMAT}.",
    ]
    if _needs_tensorflow(builder):
        lines.append(
            f"Preparing `{builder.name}` also needs TensorFlow, once: "
            "pip install tensorflow."
        )
    lines.append("The default, --dataset=digits, needs no files.")
    return "\n".join(lines)


def known_names() -> Sequence[str]:
    """The names of all data sets, ours and TFDS's."""
    with contextlib.redirect_stderr(io.StringIO()):  # TensorFlow's banner.
        theirs = tfds.list_builders(with_community_datasets=False)
    return ["digits", "digit_trimaps", *theirs]


def make_builder(name: str, data_dir: Path | None) -> Any:
    """Makes the TFDS builder of the data set `name`.

    Args:
        name: Its name in TFDS, such as `mnist` or `emnist/letters`, or `digits`, or
            `digit_trimaps`.
        data_dir: Folder of prepared data sets; `None` for TFDS's own default.

    Returns:
        The builder.

    Raises:
        UsageError: If TFDS has no such data set.
    """
    folder = None if data_dir is None else str(data_dir.expanduser())
    if name == "digits":
        from jbn.training.digits.builder import Digits

        return Digits(data_dir=folder)
    if name == "digit_trimaps":
        from jbn.training.digits.trimaps import DigitTrimaps

        return DigitTrimaps(data_dir=folder)
    if name in idx.NAMES:
        return idx.builder_class(name)(data_dir=folder)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # TensorFlow's banner.
            return tfds.builder(name, data_dir=folder)
    except DatasetNotFoundError as error:
        close = difflib.get_close_matches(re.split("[/:]", name)[0], known_names(), 1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise UsageError(
            f"TFDS knows no data set called `{name}`, and there is no such folder."
            + hint
        ) from error
    except ImportError as error:
        raise UsageError(
            f"TFDS cannot make the builder of `{name}` with what is installed: {error}"
        ) from error
    except (AssertionError, ValueError) as error:  # An unknown config or version.
        raise UsageError(f"--dataset={name}: {error}") from error
