"""Has the reference show `Example:` of a docstring as code, as it does `Examples:`."""

import re

import griffe


class Examples(griffe.Extension):
    """Renames the section."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Called for whatever has been read."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", text, flags=re.MULTILINE
            )
