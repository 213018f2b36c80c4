"""What a gateway is made of, without HTTP, actors or engines: keys, limits, streams of tokens, text."""
