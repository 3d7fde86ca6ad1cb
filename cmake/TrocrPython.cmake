# Finds the project's Python: -DPython_EXECUTABLE, the active virtual environment, .venv, else python3 of the PATH.
# Sets Python_EXECUTABLE, TROCR_SITE_PACKAGES, and pybind11_FOUND where its headers and Python's are there.
set(Python_FIND_VIRTUALENV FIRST)
set(Python_FIND_STRATEGY LOCATION)
if(NOT Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS ${CMAKE_SOURCE_DIR}/.venv/bin/python)
    set(Python_EXECUTABLE ${CMAKE_SOURCE_DIR}/.venv/bin/python CACHE FILEPATH "Python of the project's environment")
endif()

find_package(Python 3.11 COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)
if(Python_Interpreter_FOUND)
    # Where pip installs, which on Debian and Ubuntu is not Python_SITELIB.
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
                    OUTPUT_VARIABLE TROCR_SITE_PACKAGES OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(Python_Development.Module_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                    OUTPUT_VARIABLE pybind11_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_package(pybind11 CONFIG QUIET)
endif()
