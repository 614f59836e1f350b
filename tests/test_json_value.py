"""JSON whose content is not known: every reader returns its type, whatever the value is."""

import json

import pytest

from ldm.json_value import as_list, as_object, as_text, load_json, load_object, objects_of

VALUES = [None, True, 1, 1.5, "a", [], ["a", {"b": 1}, 2, {}], {}, {"a": [1]}]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_a_value_comes_out_as_its_type_or_empty(value):
    text = json.dumps(value)
    assert load_json(text) == value == load_json(text.encode())
    assert load_object(text) == as_object(value) == (value if type(value) is dict else {})
    assert as_list(value) == (value if type(value) is list else [])
    assert as_text(value) == (value if type(value) is str else "")
    assert list(objects_of(value)) == [entry for entry in as_list(value) if type(entry) is dict]


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "[" * 100_000, '{"a":' * 100_000], ids=lambda t: t[:8])
def test_what_is_not_json_is_one_kind_of_error(text):
    with pytest.raises(ValueError):
        load_json(text)
    assert load_object(text) == {}
