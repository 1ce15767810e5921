REMEDIES: dict[tuple[str, int], str]
