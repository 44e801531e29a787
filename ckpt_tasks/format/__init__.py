"""The format on storage: layout, manifest, safetensors headers, digests, the typed tree."""
