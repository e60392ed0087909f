"""Saved states as trees."""


def leaves(state, path=()):
    """{path: value} of everything in a saved state that is no dict or list."""
    if isinstance(state, dict):
        return {place: value for key, inner in state.items() for place, value in leaves(inner, (*path, key)).items()}
    if isinstance(state, list):
        return {place: value for i, inner in enumerate(state) for place, value in leaves(inner, (*path, i)).items()}
    return {path: state}
