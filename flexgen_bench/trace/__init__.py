"""Looking at what the lanes did in a recorded run: pictures, Perfetto, figures. Works from records alone."""
