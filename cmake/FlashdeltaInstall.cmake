# What an installed flashdelta consists of: the library, the two headers, a CMake package and a pkg-config file.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashdelta)
install(TARGETS flashdelta EXPORT flashdelta LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/flashdelta DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")
install(EXPORT flashdelta NAMESPACE flashdelta:: DESTINATION ${package_dir} FILE flashdeltaTargets.cmake)
configure_package_config_file(cmake/flashdeltaConfig.cmake.in ${PROJECT_BINARY_DIR}/flashdeltaConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flashdeltaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/flashdeltaConfig.cmake ${PROJECT_BINARY_DIR}/flashdeltaConfigVersion.cmake DESTINATION ${package_dir})

# Relative to the .pc file itself, so that an installed tree can be moved.
file(RELATIVE_PATH FLASHDELTA_PC_PREFIX /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
string(REGEX REPLACE "/$" "" FLASHDELTA_PC_PREFIX "${FLASHDELTA_PC_PREFIX}")
configure_file(cmake/flashdelta.pc.in ${PROJECT_BINARY_DIR}/flashdelta.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/flashdelta.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
