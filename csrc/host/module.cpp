// Python bindings of publishing's host side: addresses in and out, nothing of torch; the GIL is free while memory moves.
// Copyright the AdvGame authors. SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>
#include <tuple>

#include "copies.h"
#include "cudart.h"
#include "shared_memory.h"

namespace py = pybind11;
using Free = py::call_guard<py::gil_scoped_release>;

using Entry = std::tuple<uintptr_t, uintptr_t, size_t, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>>;

static std::unique_ptr<Copies> copies_of(const std::vector<Entry>& entries) {
    std::vector<Box> boxes;
    for (const auto& [to, from, item, shape, to_stride, from_stride] : entries)
        boxes.push_back({to, from, item, shape, to_stride, from_stride});
    return std::make_unique<Copies>(boxes);
}

// What torch.as_tensor reads an address, a length and a type from.
static py::dict array_interface(const cuda::Memory& memory) {
    py::dict found;
    found["shape"] = py::make_tuple(memory.bytes);
    found["typestr"] = "|u1";
    found["data"] = py::make_tuple(reinterpret_cast<uintptr_t>(memory.data), false);
    found["strides"] = py::none();
    found["version"] = 3;
    return found;
}

PYBIND11_MODULE(_host, m) {
    m.doc() = "The host side of publishing: shared memory, CUDA IPC, graphs of copies; called through advgame.publish.host.";

    py::register_exception_translator([](std::exception_ptr raised) {
        try {
            if (raised) std::rethrow_exception(raised);
        } catch (const std::system_error& error) {
            errno = error.code().value();
            PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
        }
    });

    py::class_<SharedMemory>(m, "SharedMemory", py::buffer_protocol())
        .def(py::init<size_t>(), py::arg("bytes"), "Zeros in a file without a name.")
        .def(py::init<const std::string&, size_t>(), py::arg("path"), py::arg("bytes"), "Somebody else's.")
        .def_property_readonly("descriptor", &SharedMemory::descriptor)
        .def("close_file", &SharedMemory::close_file)
        .def_buffer([](SharedMemory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()), (py::ssize_t)memory.bytes());
        });

    py::class_<cuda::Runtime, std::shared_ptr<cuda::Runtime>>(m, "Runtime")
        .def(py::init<const std::string&>(), py::arg("path") = "", "Empty: the one that torch has loaded, or the system's.")
        .def_readonly("path", &cuda::Runtime::path)
        .def_property_readonly("version",
                               [](const cuda::Runtime& runtime) {
                                   int version = 0;
                                   runtime.check(runtime.RuntimeGetVersion(&version), "cudaRuntimeGetVersion");
                                   return version;
                               })
        .def("reaches", &cuda::reaches, Free(), py::arg("device"), py::arg("peer"))
        .def("allocate", &cuda::Memory::allocate, Free(), py::arg("device"), py::arg("bytes"))
        .def(
            "open",
            [](std::shared_ptr<cuda::Runtime> runtime, int device, const py::bytes& handle, size_t bytes) {
                const std::string plain = handle;
                const py::gil_scoped_release free;
                return cuda::Memory::open(std::move(runtime), device, plain, bytes);
            },
            py::arg("device"), py::arg("handle"), py::arg("bytes"));

    py::class_<cuda::Memory>(m, "DeviceMemory")
        .def_property_readonly("device", [](const cuda::Memory& memory) { return memory.device; })
        .def_property_readonly("handle", [](const cuda::Memory& memory) { return py::bytes(memory.handle()); })
        .def_property_readonly("__cuda_array_interface__", &array_interface);

    py::class_<Copies>(m, "Copies")
        .def(py::init(&copies_of), py::arg("entries"),
             "entries: (to, from, bytes of an element, shape, strides there, strides here), strides in elements.")
        .def_readonly("left", &Copies::left)
        .def_readonly("bytes", &Copies::bytes)
        .def("__len__", [](const Copies& copies) { return copies.rows.size(); })
        .def("run", &Copies::run, Free(), py::arg("threads"));

    py::class_<PublishGraph>(m, "PublishGraph")
        .def(py::init<std::shared_ptr<cuda::Runtime>, int>(), py::arg("runtime"), py::arg("device"))
        .def_property_readonly("nodes", &PublishGraph::nodes)
        .def("then_graph", &PublishGraph::then_graph, py::arg("captured"))
        .def("then_copies", &PublishGraph::then_copies, py::arg("copies"))
        .def("launch", &PublishGraph::launch, Free(), py::arg("stream"));
}
