"""nbgrader's settings for these assignments: a course of its own, and time enough on a slow machine."""

c = get_config()  # noqa: F821, nbgrader defines it

c.CourseDirectory.course_id = "minirec"
c.ExecutePreprocessor.timeout = 300  # seconds a cell; each needs a few at most, endless loops are the student's
