"""What the API reference needs to read d2kd's docstrings, which are Google's style with Sphinx's roles."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")
# "    a, b: what both are", with the lines that belong to it
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+)(: .*\n?(?:\1 +.*\n?)*)", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Make of a docstring what griffe reads.

    Roles such as ``:class:`Teacher``` become links, ``In a config::`` ends with one colon, and arguments that share a
    line get one each. ``Example:`` becomes ``Examples:``, the only name that griffe takes for code.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text = ROLE.sub(lambda match: self._link(obj, match[1]), obj.docstring.value)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = SHARED.sub(self._split, text)

    @staticmethod
    def _link(obj: griffe.Object, name: str) -> str:
        """Link to the page that has ``name``; it stays code where no page has it."""
        try:
            target = name if name.startswith("d2kd.") else obj.resolve(name)
        except griffe.NameResolutionError:
            return f"`{name}`"
        return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'

    @staticmethod
    def _split(match: re.Match) -> str:
        indent, names, meaning = match.groups()
        return "".join(f"{indent}{name}{meaning.rstrip()}\n" for name in names.split(", "))
