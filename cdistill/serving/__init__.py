"""TAF students in serving engines that know stock LLaVAs alone; each engine finds what it needs here by an entry point."""
