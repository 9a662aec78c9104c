"""Writes `digits.npz` from scikit-learn's copy of the digits.

Run once, by hand; scikit-learn is needed here and nowhere else:

    python jbn/training/digits/make_npz.py
"""

from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Splits the digits 80/20, in each class alike, and writes the archive."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    rows = np.arange(len(bunch.target))
    _, test_rows = train_test_split(
        rows, test_size=0.2, stratify=bunch.target, random_state=0
    )
    path = Path(__file__).with_name("digits.npz")
    np.savez_compressed(
        path,
        images=bunch.images.astype(np.uint8),
        labels=bunch.target.astype(np.uint8),
        test=np.isin(rows, test_rows),
    )
    print(f"{path}: {len(rows)} images, {len(test_rows)} of them to test on")


if __name__ == "__main__":
    main()
