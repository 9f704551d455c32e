"""Files of requests to files of answers; what is answered survives whatever happens to the process."""
