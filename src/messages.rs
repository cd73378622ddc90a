//! `messages!` and `functions!`: messages and remote functions as one line each.

/// Declares messages with their names on the wire and their answers.
///
/// ```
/// heliostat::messages! {
///     /// Adds, and answers with the sum.
///     pub struct Add(pub u64) = "add" -> u64;
///     /// Puts a value under a key.
///     struct Put { key: String, value: u64 } = "put" -> Option<u64>;
///     struct Reset = "reset" -> ();
/// }
/// ```
///
/// A name is unique among the messages of an actor. It and the fields, in their order, are what crosses the wire. The
/// types of fields and answers implement `Encode` and `Decode` of [`bincode`]; a type of one's own
/// derives them beside `#[bincode(crate = "heliostat::bincode")]`.
#[macro_export]
macro_rules! messages {
    () => {};
    (
        $(#[$($meta:tt)*])*
        $(pub $(($($scope:tt)*))?)? struct $name:ident = $wire:literal -> $answer:ty;
        $($rest:tt)*
    ) => {
        #[derive(Debug, Clone, $crate::bincode::Encode, $crate::bincode::Decode)]
        #[bincode(crate = "heliostat::bincode")]
        $(#[$($meta)*])*
        $(pub $(($($scope)*))?)? struct $name;
        $crate::message_impl!($name = $wire -> $answer);
        $crate::messages!($($rest)*);
    };
    (
        $(#[$($meta:tt)*])*
        $(pub $(($($scope:tt)*))?)? struct $name:ident($($fields:tt)*) = $wire:literal -> $answer:ty;
        $($rest:tt)*
    ) => {
        #[derive(Debug, Clone, $crate::bincode::Encode, $crate::bincode::Decode)]
        #[bincode(crate = "heliostat::bincode")]
        $(#[$($meta)*])*
        $(pub $(($($scope)*))?)? struct $name($($fields)*);
        $crate::message_impl!($name = $wire -> $answer);
        $crate::messages!($($rest)*);
    };
    (
        $(#[$($meta:tt)*])*
        $(pub $(($($scope:tt)*))?)? struct $name:ident {$($fields:tt)*} = $wire:literal -> $answer:ty;
        $($rest:tt)*
    ) => {
        #[derive(Debug, Clone, $crate::bincode::Encode, $crate::bincode::Decode)]
        #[bincode(crate = "heliostat::bincode")]
        $(#[$($meta)*])*
        $(pub $(($($scope)*))?)? struct $name {$($fields)*}
        $crate::message_impl!($name = $wire -> $answer);
        $crate::messages!($($rest)*);
    };
}

/// The two impls of a message; for `messages!`.
#[doc(hidden)]
#[macro_export]
macro_rules! message_impl {
    ($name:ty = $wire:literal -> $answer:ty) => {
        impl $crate::actix::Message for $name {
            type Result = $answer;
        }
        impl $crate::runtime::actor::WireMessage for $name {
            const NAME: &'static str = $wire;
        }
    };
}

/// Declares stateless functions that can be called on other machines.
///
/// ```
/// use heliostat::prelude::*;
///
/// heliostat::functions! {
///     /// The sum of two numbers.
///     pub fn add(a: u64, b: u64) -> u64 {
///         a + b
///     }
///
///     /// The sum of the numbers in an object.
///     pub fn total(cx: &FunctionCx, numbers: ObjectRef) -> Result<u64, ObjectError> {
///         Ok(cx.get_value::<Vec<u64>>(&numbers)?.iter().sum())
///     }
/// }
/// # assert_eq!((add::NAME, total::NAME), ("add", "total"));
/// ```
///
/// Each is a type of its name, for `Program::function::<add>()` and `pool.call::<add>((1, 2))`. It may block its thread. One
/// that reads or puts objects takes a `&FunctionCx` first, which its callers do not see.
#[macro_export]
macro_rules! functions {
    () => {};
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($cx:ident: &FunctionCx $(, $arg:ident: $type:ty)* $(,)?) -> $output:ty $body:block
        $($rest:tt)*
    ) => {
        $crate::functions!(@one [$(#[$meta])*] $vis $name $cx ($($arg: $type),*) $output, $body);
        $crate::functions!($($rest)*);
    };
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $output:ty $body:block
        $($rest:tt)*
    ) => {
        $crate::functions!(@one [$(#[$meta])*] $vis $name _cx ($($arg: $type),*) $output, $body);
        $crate::functions!($($rest)*);
    };
    (@one [$($meta:tt)*] $vis:vis $name:ident $cx:ident ($($arg:ident: $type:ty),*) $output:ty, $body:block) => {
        $($meta)*
        #[allow(non_camel_case_types, reason = "it is called like a function")]
        $vis struct $name;
        impl $crate::runtime::function::RemoteFunction for $name {
            const NAME: &'static str = stringify!($name);
            type Args = ($($type,)*);
            type Output = $output;

            fn call(($($arg,)*): Self::Args, $cx: &$crate::runtime::function::FunctionCx) -> Self::Output $body
        }
    };
}
