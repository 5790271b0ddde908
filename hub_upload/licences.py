"""Licences of weights: the backbones', as their repositories state them, and the strictest of these for the model.

A licence is a dictionary of the Hub's own card fields: `license`, and for `other` also `license_name` and `license_link`. A licence
that is not stated is None, and never guessed.
"""

import difflib
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled


FIELDS = ("license", "license_name", "license_link")
# From the least strict to the strictest, by the Hub's names.
PERMISSIVE = (
    *("wtfpl", "unlicense", "cc0-1.0", "0bsd", "pddl", "isc", "zlib", "bsl-1.0", "ncsa", "postgresql", "mit", "bsd"),
    *(
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "ms-pl",
        "afl-3.0",
        "artistic-2.0",
        "ecl-2.0",
        "apache-2.0",
    ),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "odc-by", "etalab-2.0"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
)
WEAK_COPYLEFT = (
    *("ofl-1.1", "lppl-1.3c", "mpl-2.0", "epl-1.0", "epl-2.0", "cdla-sharing-1.0"),
    *("lgpl-lr", "lgpl", "lgpl-2.1", "lgpl-3.0", "eupl-1.1", "eupl-1.2"),
)
COPYLEFT = (*("odbl", "cc-by-sa-3.0", "cc-by-sa-4.0", "gfdl", "osl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0"),)
NON_COMMERCIAL = (
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
)
ORDER = (*PERMISSIVE, *WEAK_COPYLEFT, *COPYLEFT, *NON_COMMERCIAL)
# The others of the Hub's list (https://huggingface.co/docs/hub/repositories-licenses), but `unknown`, which names none.
OWN_TERMS = (
    *("openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m", "bigcode-openrail-m"),
    *("bigscience-bloom-rail-1.0", "deepfloyd-if-license", "c-uda", "cc", "openmdw-1.0", "openmdw-1.1"),
    *("h-research", "intel-research", "fair-noncommercial-research-license", "apple-ascl", "apple-amlr"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "grok2-community", "other"),
)
HALVES = {"vision": "vision encoder", "language": "language model"}


def read_licence(name: str, revision: str | None = None) -> dict[str, str] | None:
    """Reads the licence in the README.md of a local folder or Hub repository; None if it states none or cannot be read.

    Of several licences the strictest is taken. A link to a file of the repository becomes an address, and is left out for a local
    folder, whose files nobody else has.
    """
    if Path(name).is_dir():
        file, home = Path(name) / "README.md", None
        if not file.is_file():
            return None
    else:
        try:
            file = Path(hf_hub_download(name, "README.md", revision=revision))
        except (EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ValueError):
            return None
        home = f"https://huggingface.co/{name}/blob/{revision or 'main'}"
    try:
        data = metadata_load(file) or {}
    except (ValueError, yaml.YAMLError):  # metadata that cannot be read state nothing
        return None
    stated = data.get("license")
    stated = [str(one).strip().lower() for one in (stated if isinstance(stated, list) else [stated]) if one]
    if not stated or "unknown" in stated:
        return None
    strict = strictest([{"license": one} for one in stated])
    if strict is None or strict["license"] != "other":
        return strict
    link = str(data.get("license_link") or "")
    if link and "://" not in link:
        link = f"{home}/{link.removeprefix('./')}" if home else ""
    named = {"license": "other", "license_name": str(data.get("license_name") or ""), "license_link": link}
    return {field: value for field, value in named.items() if value}


def strictest(licences: list[dict[str, str] | None]) -> dict[str, str] | None:
    """Finds the strictest of several licences; None if one of them is not known, or two cannot be compared."""
    if not licences or None in licences:
        return None
    own_terms = [licence for licence in licences if licence["license"] not in ORDER]
    if not own_terms:
        return max(licences, key=lambda licence: ORDER.index(licence["license"]))
    # A licence with terms of its own is stricter than open ones; two such licences cannot be compared.
    comparable = (own_terms[0]["license"], *PERMISSIVE, *WEAK_COPYLEFT, *COPYLEFT)
    same = all(licence == own_terms[0] for licence in own_terms)
    return own_terms[0] if same and all(licence["license"] in comparable for licence in licences) else None


def given_licence(
    license: str | None, license_name: str | None = None, license_link: str | None = None
) -> dict[str, str] | None:
    """What `--license`, `--license_name` and `--license_link` say; None if they are not given.

    Raises:
        ValueError: if the Hub does not know the license, or needs more of them.
    """
    if not license:
        if license_name or license_link:
            raise ValueError("license_name and license_link belong to a license: name it, such as --license other.")
        return None
    if problem := problem_with(license):
        raise ValueError(f"{problem}.")
    licence = {"license": license, "license_name": license_name, "license_link": license_link}
    licence = {field: value for field, value in licence.items() if value}
    if license == "other" and set(licence) != set(FIELDS):
        raise ValueError(
            "The Hub wants the name of a license `other` and where to read it: --license_name and --license_link."
        )
    return licence


def problem_with(license: object) -> str | None:
    """Says that a license is not on the Hub's list, which the nearest are, and what to do; None if it is."""
    valid = (*ORDER, *OWN_TERMS)
    if license in valid:
        return None
    nearest = difflib.get_close_matches(str(license).lower(), valid, 3)
    return (
        f"license {license!r} is not on the Hub's list (https://huggingface.co/docs/hub/repositories-licenses). "
        + (f"Did you mean {', '.join(nearest)}? " if nearest else "")
        + "Name one of it, or --license other with --license_name and --license_link"
    )


def licence_of(record: dict) -> dict[str, str]:
    """The licence of a model's weights: the one its run record names as given, else the strictest of its backbones.

    Raises:
        ValueError: if that is not known; the message asks for `--license`.
    """
    if record.get("licence"):
        return record["licence"]
    ask = "Name that of your weights: --license LICENSE (in a stage: push_license)."
    backbones = record.get("backbones", {})
    found = {half: backbones.get(f"{half}_licence") for half in HALVES}
    if unknown := [half for half, licence in found.items() if not licence]:
        names = " and ".join(f"the {HALVES[half]} {str(backbones.get(half, 'unknown'))!r}" for half in unknown)
        raise ValueError(f"No licence is on record of {names}. {ask}")
    strict = strictest(list(found.values()))
    if strict is None:
        first, second = (licence_name(licence) for licence in found.values())
        raise ValueError(f"The backbones' licences, {first} and {second}, each have terms of their own. {ask}")
    if strict["license"] == "other" and set(strict) != set(FIELDS):
        raise ValueError(
            f"A backbone is under a license `other` without {' and '.join(f for f in FIELDS if f not in strict)}, which the Hub "
            f"wants. {ask} With `other` also --license_name and --license_link."
        )
    return strict


def licence_name(licence: dict[str, str] | None) -> str:
    """A licence in words, for a card."""
    if not licence:
        return "not stated"
    name = licence.get("license_name") or licence["license"]
    return f"[{name}]({licence['license_link']})" if licence.get("license_link") else f"`{name}`"
