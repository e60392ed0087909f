"""docs/openapi.json, the route table and the shapes agree."""
import json
from pathlib import Path

from kvmapp import errors
from kvmapp.daemon import openapi, routes, shapes

ROOT = Path(__file__).resolve().parents[2]


def test_document_is_what_the_tables_give():
    assert (ROOT / "docs/openapi.json").read_text() == openapi.render(), "python -m kvmapp.daemon.openapi > docs/openapi.json"


def test_rendering_is_json_of_the_description():
    assert json.loads(openapi.render()) == openapi.description()


def test_every_reference_leads_somewhere():
    text = openapi.render()
    for name in set(text.split("#/components/schemas/")[1:]):
        assert name.partition('"')[0] in shapes.SCHEMAS
    assert all(not route.answer or route.answer in shapes.SCHEMAS for route in routes.ROUTES)


def test_names_are_unique_and_queries_change_nothing():
    assert len({route.name for route in routes.ROUTES}) == len(routes.ROUTES)
    assert all(route.method == "GET" for route in routes.ROUTES if route.access == routes.READ_ONLY)


def test_statuses_belong_to_errors():
    others = {"bad-request", "console-busy", "changed-meanwhile"}       # of vmprocess and the daemon itself
    assert set(routes.STATUS) - others <= set(errors.BY_CODE)


def test_complaint():
    shape = shapes.record(name=shapes.text(), state=shapes.maybe(shapes.one_of("a", "b")), jobs=shapes.list_of(shapes.ref("Job")))
    job = {"verb": "start", "who": "root", "since": 1.5, "progress": None}
    assert shapes.complaint(shape, {"name": "x", "state": None, "jobs": [job]}) is None
    assert shapes.complaint(shape, {"name": "x", "state": "b", "jobs": [{**job, "since": "now"}]}) == \
        "jobs[0].since is 'now', not number"
    assert shapes.complaint(shape, {"name": "x", "jobs": []}) == "state is missing"
    assert shapes.complaint(shape, {"name": True, "state": "a", "jobs": []}) == "name is True, not string"
    assert shapes.complaint(shapes.START, {"pause": True}) == "pause is not known here (known: paused, force_boot)"
    assert shapes.complaint(shapes.SHUTDOWN, {"mode": "agent"}) == "mode is 'agent', not one of acpi"
    assert shapes.complaint(shapes.whole(), True) == "it is True, not integer"
    assert shapes.complaint(shapes.maybe(shapes.ref("Job")), None) is None
