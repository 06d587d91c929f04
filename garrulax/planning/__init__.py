"""Plans of training runs on chips that are not there: memory, operations, collectives, and the time of a step."""
