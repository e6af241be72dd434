"""One softmax over in-context, fading and eidetic keys; see `api.memory_attention`."""
