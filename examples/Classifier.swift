// Runs a kdistill .tflite on iOS. Labels, type and scale are read from the file itself.
// CocoaPods: pod 'TensorFlowLiteSwift'
import Foundation
import TensorFlowLite

final class Classifier {
    let labels: [String]
    private let interpreter: Interpreter

    init(path: String, threads: Int = 2) throws {
        var options = Interpreter.Options()
        options.threadCount = threads
        interpreter = try Interpreter(modelPath: path, options: options)
        try interpreter.allocateTensors()
        let content = try Data(contentsOf: URL(fileURLWithPath: path), options: .mappedIfSafe)
        guard let text = Classifier.member("labels.txt", of: content) else {
            throw CocoaError(.fileReadCorruptFile)
        }
        labels = String(decoding: text, as: UTF8.self).split(separator: "\n").map(String.init)
    }

    /// `pixels`: 0..255, row by row, the channels of a pixel together. One score for each label.
    func scores(_ pixels: [UInt8]) throws -> [Float] {
        let input = try interpreter.input(at: 0)
        var image = Data()
        switch input.dataType {
        case .float32:
            image = pixels.map(Float.init).withUnsafeBufferPointer { Data(buffer: $0) }
        default:
            // A uint8 input without a scale takes the pixel itself.
            let numbers = pixels.map { pixel -> Int in
                guard let scale = input.quantizationParameters, scale.scale != 0 else { return Int(pixel) }
                let number = Int((Float(pixel) / scale.scale).rounded()) + scale.zeroPoint
                return input.dataType == .uInt8 ? min(max(number, 0), 255) : min(max(number, -128), 127)
            }
            image = Data(numbers.map { UInt8(truncatingIfNeeded: $0) })
        }
        try interpreter.copy(image, toInputAt: 0)
        try interpreter.invoke()
        let output = try interpreter.output(at: 0)
        switch output.dataType {
        case .float32:
            return output.data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        case .uInt8:
            return output.data.map { dequantized(Int($0), output) }
        default:
            return output.data.map { dequantized(Int(Int8(bitPattern: $0)), output) }
        }
    }

    private func dequantized(_ number: Int, _ output: Tensor) -> Float {
        guard let scale = output.quantizationParameters else { return Float(number) }
        return Float(number - scale.zeroPoint) * scale.scale
    }

    /// A member of the archive that is appended to the model. Its members are stored, not compressed.
    private static func member(_ name: String, of content: Data) -> Data? {
        func number(_ place: Int, _ size: Int) -> Int {
            (0..<size).reduce(0) { $0 | Int(content[place + $1]) << (8 * $1) }
        }
        guard let end = content.range(of: Data([0x50, 0x4b, 0x05, 0x06]), options: .backwards) else { return nil }
        var place = number(end.lowerBound + 16, 4)
        for _ in 0..<number(end.lowerBound + 10, 2) {
            let lengths = [28, 30, 32].map { number(place + $0, 2) }
            let found = String(decoding: content[(place + 46)..<(place + 46 + lengths[0])], as: UTF8.self)
            let local = number(place + 42, 4)
            if found == name {
                let start = local + 30 + number(local + 26, 2) + number(local + 28, 2)
                return content.subdata(in: start..<(start + number(place + 20, 4)))
            }
            place += 46 + lengths.reduce(0, +)
        }
        return nil
    }
}
