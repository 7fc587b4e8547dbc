"""JSON files with any one entry damaged, in a third of all ways."""

import json
import zlib

DAMAGE = {
    "removed": None, "null": "null", "true": "true", "text": '"text"', "empty text": '""',
    "lone surrogate": '"\\ud800"', "minus": "-1", "fraction": "0.5", "large": "1e300", "float32": "3.3e38",
    "tiny": "5e-324", "huge": "9" * 400, "thousands of digits": "9" * 5000, "beyond floats": "1e999",
    "minus infinity": "-Infinity", "nan": "NaN", "list": "[]", "object": "{}", "list of text": '["a"]',
    "nested": "[" * 50 + "]" * 50, "nested too deep": "[" * 99_999 + "]" * 99_999,
}  # fmt: skip
"""Name to the JSON that an entry is replaced by."""


def entries(value, place=()):
    """Places of all entries, outer ones first; of a list, the last alone."""
    if place:
        yield place
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items[-1:] if isinstance(value, list) else items:
        yield from entries(inner, (*place, key))


def spoilt(content, place, damage):
    """The JSON text of ``content`` with one entry damaged."""
    content = json.loads(json.dumps(content))
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    if DAMAGE[damage] is None:
        del holder[place[-1]]
    else:
        holder[place[-1]] = "@@"
    return json.dumps(content).replace('"@@"', DAMAGE[damage] or "")


def is_drawn(place, damage):
    """Whether an entry gets a damage: a third of them, whatever other entries there are."""
    return zlib.crc32(f"{place} {damage}".encode()) % 3 == 0


def damages(text, lines):
    """(place, damage, damaged text) for each entry of a file and each damage that is drawn for it."""
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    for place in entries(content):
        for damage in (name for name in DAMAGE if is_drawn(place, name)):
            if lines:
                rows = [json.dumps(row) for row in content]
                first, *inner = place
                if inner:
                    rows[first] = spoilt(content[first], inner, damage)
                elif DAMAGE[damage] is None:
                    del rows[first]
                else:
                    rows[first] = DAMAGE[damage]
                yield place, damage, "\n".join(rows) + "\n"
            else:
                yield place, damage, spoilt(content, place, damage)


def names(sentence, place):
    """Whether a sentence names an entry, or one that it is in or that belongs to it."""
    keys = [key for key in place if isinstance(key, str)]
    return not keys or any(key in sentence for key in keys)
