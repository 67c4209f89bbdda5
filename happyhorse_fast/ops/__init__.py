"""Ops behind torch.library: schemas and fakes in torch-only modules, backends imported when first used."""
