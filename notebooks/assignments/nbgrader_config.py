"""nbgrader's settings for these assignments: a course of its own, and time enough on a slow machine."""

c = get_config()  # noqa: F821, nbgrader defines it

c.CourseDirectory.course_id = "minirec"
c.ExecutePreprocessor.timeout = 300  # seconds a cell; each needs a few at most, endless loops are the student's
c.ExecutePreprocessor.iopub_timeout = 60  # seconds until a cell's output has come; the default of 4 is short
