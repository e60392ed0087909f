"""configobj with the values left as they stand in the file, so that a rewrite changes only what was changed.

Imported only when a file is read: configobj brings `re` and costs some milliseconds. What configobj would do
otherwise: drop the space before a comment, cut an unquoted value at any `#`, and write some values so that it cannot
read them again.
"""
import re

from configobj import ConfigObj


class IniTree(ConfigObj):
    """Values are raw text, quotes included; ini.py's quote and unquote are the two ways in and out."""

    # As configobj's own, but the comment behind a heading keeps the space before it.
    _sectionmarker = re.compile(ConfigObj._sectionmarker.pattern.replace(r"\s*(\#.*)?", r"(\s*\#.*)?\s*"), re.VERBOSE)

    def __init__(self, lines: list[str]):
        super().__init__(lines, list_values=False, interpolation=False, encoding="utf-8", write_empty_values=True)
        self.encoding = None                # so that write() gives text

    def _handle_value(self, value: str):
        """Parts the raw value from its comment; the comment keeps the space before it."""
        if value[:1] in ("'", '"'):
            end = value.find(value[0], 1) + 1
            if not end:
                raise SyntaxError
        else:
            end = value.find("#")
            if end < 0:
                end = len(value)
            elif end and not value[end - 1].isspace():
                raise SyntaxError
            end = len(value[:end].rstrip())
        comment = value[end:].rstrip()
        if comment and (not comment[0].isspace() or not comment.lstrip().startswith("#")) and comment[0] != "#":
            raise SyntaxError
        return value[:end], comment

    def _multiline(self, value: str, infile, cur_index: int, maxline: int):
        mark = value[:3]
        content, comment, cur_index = super()._multiline(value, infile, cur_index, maxline)
        return mark + content + mark, f"  {comment}" if comment else "", cur_index

    def _quote(self, value, multiline: bool = True) -> str:
        return value

    def _handle_comment(self, comment: str | None) -> str:
        if not comment:
            return ""
        return comment if comment[0].isspace() else f"  {comment}"
