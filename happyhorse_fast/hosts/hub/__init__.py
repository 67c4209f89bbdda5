"""A repository of Hugging Face's `kernels`, built from this package: `python -m happyhorse_fast.hosts.hub FOLDER`.

`api` and `layers` are what such a repository offers, and work here as well.
"""
